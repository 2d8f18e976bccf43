/* A PKCS#11 client for a run under sanitizers or valgrind: smoke SHIM CONTROL.
 * Four threads open, make and close; the device goes and comes; children fork off meanwhile and
 * ask the shim (C_GetSessionInfo must be set to fail: the module's own locks may be held by a
 * thread that is not in the child); then two threads race for faults; then a child does it all
 * again. */
#define _DEFAULT_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "control.h"
#include "cryptoki.h"

enum { THREADS = 4, LOOPS = 300, ONCE = 1000 };

static const struct ck_function_list *module;
static CK_ULONG slot;

#define CALL(name, type, ...) ((CK_RV (*) type)module->function[FN_##name])(__VA_ARGS__)

static void *work(void *unused)
{
    unsigned char yes = 0, value[8];
    CK_ULONG data = 0, object, session;
    struct ck_attribute template[] = {{0, &data, sizeof data}, {CKA_TOKEN, &yes, 1}, {2, &yes, 1}};
    for (int i = 0; i < LOOPS; i++) {
        if (CALL(C_OpenSession, (word, word, word, word, word), slot, 6, 0, 0, (word)&session))
            continue;
        for (int j = 0; j < 3; j++)
            CALL(C_CreateObject, (word, word, word, word), session, (word)template, 3,
                 (word)&object);
        CALL(C_DestroyObject, (word, word), session, object);
        CALL(C_GenerateRandom, (word, word, word), session, (word)value, sizeof value);
        if (i % 2)
            CALL(C_CloseSession, (word), session);
    }
    return unused;
}

static bool child_is_answered(void)
{
    int status = 1;
    pid_t child = fork();
    if (child == 0)
        _exit(CALL(C_GetSessionInfo, (word, word), 1, 0) != 6);
    waitpid(child, &status, 0);
    return status == 0;
}

static atomic_int rounds, finished;

static void *follow(void *unused)
{
    for (int i = 1; i <= ONCE; i++) {
        while (atomic_load(&rounds) < i)
            ;
        CALL(C_GetInfo, (word), 0);
        atomic_store(&finished, i);
    }
    return unused;
}

/* A fault for one call must meet one of two calls that start together. */
static bool once_is_once(struct control *control)
{
    struct function_control *function = &control->function[FN_C_GetInfo];
    uint64_t before = atomic_load(&function->injected);
    pthread_t follower;
    atomic_store(&rounds, 0);
    atomic_store(&finished, 0);
    pthread_create(&follower, NULL, follow, NULL);
    for (int i = 1; i <= ONCE; i++) {
        atomic_store(&function->rule, (uint64_t)7 << 32 | 1 << 3 | RULE_ONCE);
        atomic_store(&rounds, i);
        CALL(C_GetInfo, (word), 0);
        while (atomic_load(&finished) != i)
            sched_yield();
    }
    pthread_join(follower, NULL);
    return atomic_load(&function->injected) - before == ONCE;
}

static int run(struct control *control)
{
    bool held = true;
    struct ck_initialize_args args = {.flags = CKF_OS_LOCKING_OK};
    CK_ULONG slots[8], count = 8;
    pthread_t thread[THREADS];
    if (CALL(C_Initialize, (word), (word)&args)
        || CALL(C_GetSlotList, (word, word, word), 1, (word)slots, (word)&count) || !count)
        return 1;
    slot = slots[0];
    for (int i = 0; i < THREADS; i++)
        pthread_create(&thread[i], NULL, work, NULL);
    for (int i = 0; i < 100; i++) {
        if (i % 5 == 0)
            atomic_fetch_add(&control->device, 5); /* one more removal, absent */
        held &= child_is_answered();
        if (i % 5 == 0)
            atomic_fetch_sub(&control->device, 1);
    }
    for (int i = 0; i < THREADS; i++)
        pthread_join(thread[i], NULL);
    held &= once_is_once(control);
    return !held || CALL(C_Finalize, (word), 0) != CKR_OK;
}

int main(int count, char **argument)
{
    union {
        void *symbol;
        CK_RV (*call)(const struct ck_function_list **);
    } get;
    void *library = count == 3 ? dlopen(argument[1], RTLD_NOW) : NULL;
    int fd = count == 3 ? open(argument[2], O_RDWR) : -1;
    struct control *control =
        mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (!library || control == MAP_FAILED)
        return 3;
    get.symbol = dlsym(library, "C_GetFunctionList");
    if (!get.symbol || get.call(&module) || run(control))
        return 4;
    int status = 1;
    pid_t child = fork();
    if (child == 0)
        _exit(run(control));
    waitpid(child, &status, 0);
    return status != 0;
}
