/* Functions of the OpenSSL that Python's own `ssl` has loaded, looked up by name: no header of OpenSSL is needed.

   A module lists what it uses as `#define LIST(X) X(result, name, (arguments)) …`, then OPENSSL_FUNCTIONS(finder, LIST)
   declares pointers of these names and `finder(path)`, which gives NULL, or what was not found. The library stays
   loaded. */

#ifndef EXCIMER_OPENSSL_LOOKUP_H
#define EXCIMER_OPENSSL_LOOKUP_H

#include <dlfcn.h>
#include <stddef.h>

#define OPENSSL_DECLARE(result, name, arguments) static result (*name) arguments;

#define OPENSSL_FIND(result, name, arguments) \
    if (!(*(void **) &name = dlsym(library, #name))) return #name;

#define OPENSSL_FUNCTIONS(finder, LIST) \
    LIST(OPENSSL_DECLARE) \
    static const char *finder(const char *path) { \
        void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL); \
        if (library == NULL) return "the library"; \
        LIST(OPENSSL_FIND) \
        return NULL; \
    }

#endif
