// Adding up what the threads of a workgroup of WG have; `vec4`: four rows, a row quad in lane bits 0 and 1.
// What remains to be added for a quad lies at part[first + i * STEP + quad].
#ifdef SUBGROUP
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_shuffle : require
uint thread() { return gl_SubgroupID * gl_SubgroupSize + gl_SubgroupInvocationID; }
vec4 add_up(vec4 v) {
  for (uint mask = 4u; mask < gl_SubgroupSize; mask <<= 1) v += subgroupShuffleXor(v, mask);
  return v;
}
#define STEP gl_SubgroupSize
#else
uint thread() { return gl_LocalInvocationIndex; }
vec4 add_up(vec4 v) { return v; }
#define STEP 4u
#endif
