#include "ledger.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/types.h>
#include <unistd.h>

/* A session (owner: slot) or a session object (owner: session). */
struct row {
    CK_ULONG handle, owner;
    unsigned inside;
};

struct table {
    struct row *rows;
    size_t count, capacity;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct table sessions, objects;
static struct control *control;
static struct process_share *share; /* NULL: not claimed yet */

static struct row *find(struct table *table, CK_ULONG handle)
{
    for (size_t i = 0; i < table->count; i++)
        if (table->rows[i].handle == handle)
            return &table->rows[i];
    return NULL;
}

static void add(struct table *table, CK_ULONG handle, CK_ULONG owner)
{
    if (table->count == table->capacity) {
        table->capacity = table->capacity ? 2 * table->capacity : 64;
        table->rows = realloc(table->rows, table->capacity * sizeof *table->rows);
        if (!table->rows)
            abort(); /* an incomplete ledger would report violations that did not happen */
    }
    table->rows[table->count++] = (struct row){handle, owner, 0};
}

static bool drop(struct table *table, CK_ULONG handle)
{
    struct row *row = find(table, handle);
    if (row)
        *row = table->rows[--table->count];
    return row != NULL;
}

static void drop_owned(struct table *table, CK_ULONG owner)
{
    for (size_t i = table->count; i-- > 0;)
        if (table->rows[i].owner == owner)
            table->rows[i] = table->rows[--table->count];
}

static bool claim(struct process_share *candidate)
{
    uint64_t holder = atomic_load(&candidate->pid);
    bool dead = holder == 0 || (kill((pid_t)holder, 0) != 0 && errno == ESRCH);
    return dead && atomic_compare_exchange_strong(&candidate->pid, &holder, (uint64_t)getpid());
}

static void publish(void)
{
    for (size_t i = 0; !share && i < PROCESSES_MAX; i++)
        if (claim(&control->process[i]))
            share = &control->process[i];
    if (!share) {
        atomic_fetch_add(&control->processes_refused, 1);
        return;
    }
    atomic_store(&share->sessions, sessions.count);
    atomic_store(&share->session_objects, objects.count);
    raise_high_water(&control->session_high_water, sessions.count);
}

static void finish(void)
{
    publish();
    pthread_mutex_unlock(&lock);
}

void ledger_open(struct control *opened)
{
    control = opened;
}

void ledger_session_opened(CK_ULONG session, CK_ULONG slot)
{
    pthread_mutex_lock(&lock);
    add(&sessions, session, slot);
    finish();
}

void ledger_session_closed(CK_ULONG session)
{
    pthread_mutex_lock(&lock);
    drop(&sessions, session);
    drop_owned(&objects, session);
    finish();
}

void ledger_slot_closed(CK_ULONG slot)
{
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < sessions.count; i++)
        if (sessions.rows[i].owner == slot)
            drop_owned(&objects, sessions.rows[i].handle);
    drop_owned(&sessions, slot);
    finish();
}

void ledger_clear(void)
{
    pthread_mutex_lock(&lock);
    sessions.count = objects.count = 0;
    finish();
}

size_t ledger_sessions(void)
{
    pthread_mutex_lock(&lock);
    size_t count = sessions.count;
    pthread_mutex_unlock(&lock);
    return count;
}

bool ledger_any_slot(CK_ULONG *slot)
{
    pthread_mutex_lock(&lock);
    bool any = sessions.count > 0;
    if (any)
        *slot = sessions.rows[0].owner;
    pthread_mutex_unlock(&lock);
    return any;
}

void ledger_object_made(CK_ULONG object, CK_ULONG session)
{
    pthread_mutex_lock(&lock);
    add(&objects, object, session);
    finish();
}

bool ledger_object_destroyed(CK_ULONG object)
{
    pthread_mutex_lock(&lock);
    bool known = drop(&objects, object);
    finish();
    return known;
}

bool ledger_is_session_object(CK_ULONG object)
{
    pthread_mutex_lock(&lock);
    bool known = find(&objects, object) != NULL;
    pthread_mutex_unlock(&lock);
    return known;
}

bool ledger_enter(CK_ULONG session)
{
    pthread_mutex_lock(&lock);
    struct row *row = find(&sessions, session);
    bool alone = !row || row->inside++ == 0;
    pthread_mutex_unlock(&lock);
    return alone;
}

void ledger_leave(CK_ULONG session)
{
    pthread_mutex_lock(&lock);
    struct row *row = find(&sessions, session);
    if (row && row->inside > 0)
        row->inside--;
    pthread_mutex_unlock(&lock);
}

bool ledger_slot_busy(CK_ULONG slot)
{
    bool busy = false;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < sessions.count; i++)
        busy |= sessions.rows[i].owner == slot && sessions.rows[i].inside > 0;
    pthread_mutex_unlock(&lock);
    return busy;
}

void ledger_before_fork(void)
{
    pthread_mutex_lock(&lock);
}

void ledger_after_fork_in_parent(void)
{
    pthread_mutex_unlock(&lock);
}

void ledger_after_fork_in_child(void)
{
    sessions.count = objects.count = 0;
    share = NULL;
    pthread_mutex_unlock(&lock);
}
