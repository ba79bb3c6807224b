/* Loaded before the module `bochscpu`, and so asked before it for what both define. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

/* The module was built with glibc 2.38; older ones have these under their old names. */
unsigned long long __isoc23_strtoull(const char *text, char **end, int base) { return strtoull(text, end, base); }

int __isoc23_sscanf(const char *text, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  int read = vsscanf(text, format, arguments);
  va_end(arguments);
  return read;
}

/* The module emulates a Cannon Lake, which lacks VNNI. It has an Ice Lake too, and no way to ask for it: this is the way. */
void *_Z23create_corei3_cnl_cpuidP8BX_CPU_C(void *cpu) {
  void *(*ice_lake)(void *) = (void *(*)(void *))dlsym(RTLD_DEFAULT, "_Z29create_corei7_icelake_u_cpuidP8BX_CPU_C");
  return ice_lake(cpu);
}
