#version 450
// y = x, 64 bytes by each thread: the bandwidth that shaders of this device can have (benchmarks/vulkan_shaders.py).
// vkCmdCopyBuffer may be slower: on an H100 it reaches 0.85 of 3.0 TB/s.
layout(local_size_x = 256, local_size_y = 1, local_size_z = 1) in;
layout(std430, binding = 0) readonly buffer X { uvec4 x[]; };
layout(std430, binding = 6) writeonly buffer Y { uvec4 y[]; };

void main() {
  const uint first = gl_WorkGroupID.x * 1024u + gl_LocalInvocationIndex;
  uvec4 v[4];
  for (uint i = 0u; i < 4u; ++i) v[i] = x[first + i * 256u];
  for (uint i = 0u; i < 4u; ++i) y[first + i * 256u] = v[i];
}
