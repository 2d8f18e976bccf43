/* A PKCS#11 module in front of another one: forwards every call, or injects a fault.
 *
 * In the directory of this library is LIBRARY.conf with two lines, the real module and the control file.
 * Only C_GetFunctionList is exported; what it hands out is one static table.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "control.h"
#include "cryptoki.h"
#include "ledger.h"
#include "makers.h"
#include "restrictions.h"
#include "vendor.h"
#include "verdict.h"

#define DESCRIPTION(name, arity, kind) {arity, kind},
static const struct {
    unsigned char arity;
    enum function_kind kind;
} description[FUNCTION_COUNT] = {FUNCTIONS(DESCRIPTION)};

static const struct ck_function_list *real;
static struct control *control;

/* Calls run under the read lock; what a removal destroys is destroyed under the write lock, so
 * that no session vanishes under a running call (SoftHSM 2.6.1 would use freed memory). */
static struct {
    pthread_rwlock_t lock;
    atomic_uint inside, finalizing;
    atomic_bool initialized;
    atomic_bool stale;          /* a sticky removal happened since C_Initialize */
    uint64_t removals;          /* that this process has handled; under the lock */
} process = {.lock = PTHREAD_RWLOCK_INITIALIZER};

static const struct ck_function_list shim_list;

static CK_RV call_real(enum function_id id, const word a[])
{
    if (id == FN_C_GetFunctionList) {
        *(const struct ck_function_list **)a[0] = &shim_list;
        return CKR_OK;
    }
    ck_function f = real->function[id];
    if (!f)
        return CKR_FUNCTION_NOT_SUPPORTED;
    switch (description[id].arity) {
    case 1: return ((CK_RV (*)(word))f)(a[0]);
    case 2: return ((CK_RV (*)(word, word))f)(a[0], a[1]);
    case 3: return ((CK_RV (*)(word, word, word))f)(a[0], a[1], a[2]);
    case 4: return ((CK_RV (*)(word, word, word, word))f)(a[0], a[1], a[2], a[3]);
    case 5: return ((CK_RV (*)(word, word, word, word, word))f)(a[0], a[1], a[2], a[3], a[4]);
    case 6:
        return ((CK_RV (*)(word, word, word, word, word, word))f)(
            a[0], a[1], a[2], a[3], a[4], a[5]);
    case 8:
        return ((CK_RV (*)(word, word, word, word, word, word, word, word))f)(
            a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]);
    default: return CKR_GENERAL_ERROR;
    }
}

static CK_RV call_vendor(enum function_id id, const word a[])
{
    return vendor_call(control, id, a, call_real);
}

/* --- dying ----------------------------------------------------------------------------------- */

static void die_at_last(counter *left)
{
    uint64_t seen = atomic_load(left);
    while (seen && !atomic_compare_exchange_weak(left, &seen, seen - 1))
        ;
    if (seen == 1)
        kill(getpid(), SIGKILL);
}

/* --- recording --------------------------------------------------------------------------- */

static bool is_token_object(const struct maker *maker, const word a[])
{
    const struct ck_attribute *attribute = (const struct ck_attribute *)a[maker->template];
    for (CK_ULONG i = 0; attribute && i < a[maker->count]; i++)
        if (attribute[i].type == CKA_TOKEN && attribute[i].length == 1)
            return *(const unsigned char *)attribute[i].value != 0;
    /* A copy is like its original, everything else is a session object (section 4.4). */
    return maker->id == FN_C_CopyObject && !ledger_is_session_object(a[1]);
}

static void record_made(enum function_id id, const word a[])
{
    FOR_MAKERS(maker, id) {
        if (!a[maker->handle])
            continue;
        if (is_token_object(maker, a)) {
            atomic_fetch_add(&control->token_objects_created, 1);
            die_at_last(&control->kill_changes);
        } else
            ledger_object_made(*(const CK_ULONG *)a[maker->handle], a[0]);
    }
}

static void record_initialized(const struct ck_initialize_args *args)
{
    bool locking = args && (args->flags & CKF_OS_LOCKING_OK);
    atomic_fetch_add(locking ? &control->initialized_with_locking
                             : &control->initialized_without_locking, 1);
    atomic_store(&process.initialized, true);
    atomic_store(&process.stale, false);
}

static void record_success(enum function_id id, const word a[])
{
    switch (id) {
    case FN_C_Initialize:
        record_initialized((const struct ck_initialize_args *)a[0]);
        break;
    case FN_C_Finalize:
        atomic_store(&process.initialized, false);
        ledger_clear();
        break;
    case FN_C_OpenSession:
        ledger_session_opened(*(const CK_ULONG *)a[4], a[0]);
        break;
    case FN_C_CloseSession:
        ledger_session_closed(a[0]);
        break;
    case FN_C_CloseAllSessions:
        ledger_slot_closed(a[0]);
        break;
    case FN_C_DestroyObject:
        ledger_object_destroyed(a[1]);
        break;
    default:
        record_made(id, a);
    }
}

/* --- the device and its removal ------------------------------------------------------------ */

/* Applies a removal to this process: closes its sessions, and so ends objects and login. */
static void handle_removal(void)
{
    CK_ULONG slot;
    pthread_rwlock_wrlock(&process.lock);
    uint64_t device = atomic_load(&control->device);
    if (DEVICE_REMOVALS(device) != process.removals) {
        while (ledger_any_slot(&slot)) {
            call_real(FN_C_CloseAllSessions, (const word[]){slot});
            ledger_slot_closed(slot);
        }
        if (DEVICE_STICKY(device) && atomic_load(&process.initialized))
            atomic_store(&process.stale, true);
        process.removals = DEVICE_REMOVALS(device);
    }
    pthread_rwlock_unlock(&process.lock);
}

/* Takes the read lock once this process has handled every removal; returns the device word. */
static uint64_t lock_device(void)
{
    for (;;) {
        pthread_rwlock_rdlock(&process.lock);
        uint64_t device = atomic_load(&control->device);
        if (DEVICE_REMOVALS(device) == process.removals)
            return device;
        pthread_rwlock_unlock(&process.lock);
        handle_removal();
    }
}

static CK_RV call_slot_without_token(enum function_id id, const word a[])
{
    if (id == FN_C_GetSlotList && (unsigned char)a[0]) {
        if (!a[2])
            return CKR_ARGUMENTS_BAD;
        *(CK_ULONG *)a[2] = 0;
        return CKR_OK;
    }
    CK_RV rv = call_real(id, a);
    if (id == FN_C_GetSlotInfo && rv == CKR_OK)
        ((struct ck_slot_info *)a[1])->flags &= ~(CK_ULONG)CKF_TOKEN_PRESENT;
    return rv;
}

/* A module may leave a session object that it did not answer with: a refused one of SoftHSM. */
static bool destroys_token_object(enum function_id id, const word a[])
{
    if (id != FN_C_DestroyObject || ledger_is_session_object(a[1]))
        return false;
    unsigned char stored = 1;
    struct ck_attribute read = {CKA_TOKEN, &stored, sizeof stored};
    call_real(FN_C_GetAttributeValue, (const word[]){a[0], a[1], (word)&read, 1});
    return stored != 0;
}

static CK_RV call_device(enum function_id id, const word a[], uint64_t device)
{
    bool absent = DEVICE_ABSENT(device);
    if (atomic_load(&process.initialized) && (absent || atomic_load(&process.stale))) {
        if (description[id].kind == SESSION)
            return CKR_DEVICE_REMOVED;
        if (description[id].kind == TOKEN)
            return absent ? CKR_TOKEN_NOT_PRESENT : CKR_DEVICE_REMOVED;
        if (description[id].kind == SLOT && absent)
            return call_slot_without_token(id, a);
    }
    bool token_object = destroys_token_object(id, a);
    CK_RV rv = restricted_call(control, id, description[id].arity, a, call_vendor);
    if (rv == CKR_OK && token_object) {
        atomic_fetch_add(&control->token_objects_destroyed, 1);
        die_at_last(&control->kill_changes);
    }
    if (rv == CKR_OK)
        record_success(id, a);
    else if (id == FN_C_Initialize && rv == CKR_CRYPTOKI_ALREADY_INITIALIZED)
        atomic_store(&process.initialized, true); /* by a call that did not go through the shim */
    return rv;
}

static CK_RV perform(enum function_id id, const word a[])
{
    if (id == FN_C_WaitForSlotEvent) /* may block for ever, and needs no session */
        return call_real(id, a);
    uint64_t device = lock_device();
    CK_RV rv = call_device(id, a, device);
    pthread_rwlock_unlock(&process.lock);
    return rv;
}

/* --- one call ------------------------------------------------------------------------------ */

static void enter(enum function_id id, const word a[])
{
    if (id == FN_C_Finalize) {
        atomic_fetch_add(&process.finalizing, 1);
        if (atomic_load(&process.inside) > 0)
            atomic_fetch_add(&control->finalize_conflicts, 1);
    }
    if (description[id].kind == LIBRARY)
        return;
    raise_high_water(&control->concurrent_high_water, atomic_fetch_add(&process.inside, 1) + 1);
    if (atomic_load(&process.finalizing) > 0)
        atomic_fetch_add(&control->finalize_conflicts, 1);
    if (!atomic_load(&process.initialized))
        atomic_fetch_add(&control->uninitialized_calls, 1);
    if ((description[id].kind == SESSION && !ledger_enter(a[0]))
        || (id == FN_C_CloseAllSessions && ledger_slot_busy(a[0])))
        atomic_fetch_add(&control->session_conflicts, 1);
}

static void leave(enum function_id id, const word a[])
{
    if (id == FN_C_Finalize)
        atomic_fetch_sub(&process.finalizing, 1);
    if (description[id].kind == LIBRARY)
        return;
    if (description[id].kind == SESSION)
        ledger_leave(a[0]);
    atomic_fetch_sub(&process.inside, 1);
}

static void wait_microseconds(uint64_t latency)
{
    struct timespec rest = {(time_t)(latency / 1000000), (long)(latency % 1000000) * 1000};
    while (latency && nanosleep(&rest, &rest) != 0 && errno == EINTR)
        ;
}

/* Performs the call but discards its handles, as if the answer was lost. */
static void perform_unanswered(enum function_id id, const word a[])
{
    CK_ULONG *handles[MAKERS + 1], before[MAKERS + 1];
    size_t count = 0;
    FOR_MAKERS(maker, id)
        handles[count++] = (CK_ULONG *)a[maker->handle];
    if (id == FN_C_OpenSession)
        handles[count++] = (CK_ULONG *)a[4];
    for (size_t i = 0; i < count; i++)
        before[i] = handles[i] ? *handles[i] : 0;
    perform(id, a);
    for (size_t i = 0; i < count; i++)
        if (handles[i])
            *handles[i] = before[i];
}

static CK_RV dispatch(enum function_id id, const word a[])
{
    struct function_control *function = &control->function[id];
    uint64_t call = atomic_fetch_add(&function->calls, 1) + 1;
    die_at_last(&control->kill_calls);
    enter(id, a);
    wait_microseconds(atomic_load(&function->latency));
    struct verdict verdict = verdict_of(control, id, call);
    if (verdict.code == CKR_OK)
        verdict.code = perform(id, a);
    else if (verdict.after)
        perform_unanswered(id, a);
    leave(id, a);
    return verdict.code;
}

/* --- the table ----------------------------------------------------------------------------- */

#define PARAMETERS_1 word a1
#define PARAMETERS_2 PARAMETERS_1, word a2
#define PARAMETERS_3 PARAMETERS_2, word a3
#define PARAMETERS_4 PARAMETERS_3, word a4
#define PARAMETERS_5 PARAMETERS_4, word a5
#define PARAMETERS_6 PARAMETERS_5, word a6
#define PARAMETERS_8 PARAMETERS_6, word a7, word a8
#define ARGUMENTS_1 a1
#define ARGUMENTS_2 ARGUMENTS_1, a2
#define ARGUMENTS_3 ARGUMENTS_2, a3
#define ARGUMENTS_4 ARGUMENTS_3, a4
#define ARGUMENTS_5 ARGUMENTS_4, a5
#define ARGUMENTS_6 ARGUMENTS_5, a6
#define ARGUMENTS_8 ARGUMENTS_6, a7, a8

#define WRAPPER(name, arity, kind)                                \
    static CK_RV shim_##name(PARAMETERS_##arity)                  \
    {                                                             \
        return dispatch(FN_##name, (word[]){ARGUMENTS_##arity});  \
    }
FUNCTIONS(WRAPPER)

#define ENTRY(name, arity, kind) (ck_function)shim_##name,
static const struct ck_function_list shim_list = {{2, 40}, {FUNCTIONS(ENTRY)}};

/* --- attaching ----------------------------------------------------------------------------- */

static void before_fork(void)
{
    ledger_before_fork();
}

static void after_fork_in_parent(void)
{
    ledger_after_fork_in_parent();
}

static void after_fork_in_child(void)
{
    pthread_rwlock_init(&process.lock, NULL); /* its holders, if any, are not in this process */
    atomic_store(&process.inside, 0);
    atomic_store(&process.finalizing, 0);
    atomic_store(&process.initialized, false);
    atomic_store(&process.stale, false);
    ledger_after_fork_in_child();
    restrictions_after_fork_in_child();
    vendor_after_fork_in_child();
}

static bool complain(const char *what, const char *why)
{
    fprintf(stderr, "hsmwrap fault shim: %s: %s\n", what, why);
    return false;
}

static bool read_line(FILE *file, char *line, int size)
{
    if (!fgets(line, size, file))
        return false;
    line[strcspn(line, "\n")] = '\0';
    return line[0] != '\0';
}

static bool read_configuration(char *module, char *path, int size)
{
    Dl_info info;
    char name[4096];
    if (!dladdr(&shim_list, &info))
        return complain("dladdr", "does not know this library");
    snprintf(name, sizeof name, "%s.conf", info.dli_fname);
    FILE *file = fopen(name, "re");
    if (!file)
        return complain(name, strerror(errno));
    bool whole = read_line(file, module, size) && read_line(file, path, size);
    fclose(file);
    return whole || complain(name, "is not two lines: real module, control file");
}

static bool open_control(const char *path)
{
    struct stat status;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return complain(path, strerror(errno));
    void *mapped = MAP_FAILED;
    if (fstat(fd, &status) == 0 && status.st_size == sizeof *control)
        mapped = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (mapped == MAP_FAILED)
        return complain(path, "is not a control file of this version");
    control = mapped;
    if (control->magic != CONTROL_MAGIC || control->version != CONTROL_VERSION
        || control->size != sizeof *control)
        return complain(path, "is not a control file of this version");
    return true;
}

static bool open_real(const char *module)
{
    union {
        void *symbol;
        CK_RV (*call)(const struct ck_function_list **);
    } get;
    void *library = dlopen(module, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return complain(module, dlerror());
    get.symbol = dlsym(library, "C_GetFunctionList");
    if (!get.symbol || get.call(&real) != CKR_OK || !real)
        return complain(module, "is not a PKCS#11 module");
    return true;
}

static bool attached;

static void attach(void)
{
    static char module[4096], path[4096];
    if (!read_configuration(module, path, sizeof module) || !open_control(path)
        || !open_real(module))
        return;
    process.removals = DEVICE_REMOVALS(atomic_load(&control->device));
    ledger_open(control);
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
    attached = true;
}

__attribute__((visibility("default"))) CK_RV C_GetFunctionList(const struct ck_function_list **list)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, attach);
    if (!attached)
        return CKR_GENERAL_ERROR;
    return list ? shim_C_GetFunctionList((word)list) : CKR_ARGUMENTS_BAD;
}
