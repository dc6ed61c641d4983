/* Declares a function that takes the place of libc's. The tests, which need libc's own, give it another name. */
#ifndef HYDRATE_INTERPOSED_H
#define HYDRATE_INTERPOSED_H

#ifdef HYDRATE_PREFIXED
#define INTERPOSED(name) preloaded_##name
#else
#define INTERPOSED(name) name
#endif

/* Also for names that no header of ours declares (the fortified and the 64-bit ones). */
#define INTERPOSE(type, name, ...)                                                                                     \
    __attribute__((visibility("default"))) type INTERPOSED(name)(__VA_ARGS__);                                         \
    __attribute__((visibility("default"))) type INTERPOSED(name)(__VA_ARGS__)

#endif
