#include "libcrypto.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

static struct libcrypto functions;
static bool loaded;

static void load(void)
{
    void *library = dlopen("libcrypto.so.3", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        fprintf(stderr, "hsmwrap fault shim: a vendor is played with %s\n", dlerror());
        return;
    }
#define LIBCRYPTO_SYMBOL(result, name, arguments) {#name, &functions.name, sizeof functions.name},
    const struct {
        const char *name;
        void *member;
        size_t size;
    } wanted[] = {LIBCRYPTO(LIBCRYPTO_SYMBOL)};
    loaded = true;
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        void *symbol = dlsym(library, wanted[i].name);
        loaded &= symbol != NULL;
        memcpy(wanted[i].member, &symbol, wanted[i].size);
    }
}

const struct libcrypto *libcrypto(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, load);
    return loaded ? &functions : NULL;
}
