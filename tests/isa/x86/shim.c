/* Loaded before the module `bochscpu`, and so asked before it for what both define. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The module was built with glibc 2.38; older ones have these under their old names. */
unsigned long long __isoc23_strtoull(const char *text, char **end, int base) { return strtoull(text, end, base); }

int __isoc23_sscanf(const char *text, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  int read = vsscanf(text, format, arguments);
  va_end(arguments);
  return read;
}

/* The module emulates a Cannon Lake, which lacks VNNI. It has other CPUs too, and no way to ask for them: this is the way. */
void *_Z23create_corei3_cnl_cpuidP8BX_CPU_C(void *cpu) {
  const char *name = getenv("CUPOLA_EMULATED_CPU");
  int arrow_lake = name != NULL && strcmp(name, "arrow-lake") == 0;
  if (!arrow_lake && (name == NULL || strcmp(name, "ice-lake") != 0)) {
    fprintf(stderr, "CUPOLA_EMULATED_CPU is %s: it must be ice-lake or arrow-lake\n", name ? name : "not set");
    exit(2);
  }
  const char *symbol = arrow_lake ? "_Z23create_arrow_lake_cpuidP8BX_CPU_C" : "_Z29create_corei7_icelake_u_cpuidP8BX_CPU_C";
  void *(*create)(void *) = (void *(*)(void *))dlsym(RTLD_DEFAULT, symbol);
  return create(cpu);
}
