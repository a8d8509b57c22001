// libstdc++ asks glibc's `__libc_single_threaded` whether reference counts may do without atomic instructions. It came
// with glibc 2.32 and is the only symbol newer than 2.16 that this library would need. With an answer of its own,
// "never", a wheel built on a newer system loads where torch's own wheels do (glibc 2.28).
extern "C" {
extern __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
}
