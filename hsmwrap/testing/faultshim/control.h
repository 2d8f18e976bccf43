/* The control file: what the test tells the shim, and what the shim tells the test.
 *
 * One mapping, shared by every process that loads the shim and by the Python side, which makes
 * the file (hsmwrap/testing/_control.py mirrors this layout). Each field is one atomic word with
 * one kind of writer, so no lock is ever taken across processes. Raise CONTROL_VERSION with
 * each change.
 */
#ifndef HSMWRAP_CONTROL_H
#define HSMWRAP_CONTROL_H

#include <assert.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "functions.h"

#define CONTROL_MAGIC 0x6D696873u /* "shim" */
#define CONTROL_VERSION 4u

enum { CODES_MAX = 16, PROCESSES_MAX = 128, PIN_MAX = 64 };

typedef _Atomic uint64_t counter;
static_assert(sizeof(counter) == 8 && ATOMIC_LLONG_LOCK_FREE == 2, "no lock-free 64-bit atomics");

/* rule: code << 32 | count << 3 | after << 2 | mode. One word, so that it changes as a whole. */
enum rule_mode { RULE_OFF, RULE_ONCE, RULE_EVERY };
#define RULE_MODE(rule) ((enum rule_mode)((rule) & 3))
#define RULE_AFTER(rule) (((rule) >> 2) & 1)
#define RULE_COUNT(rule) (((rule) >> 3) & 0x1FFFFFFF)
#define RULE_CODE(rule) ((rule) >> 32)

/* chance: number of codes << 32 | after << 31 | probability (of 65536) */
#define CHANCE_PROBABILITY(chance) ((chance) & 0x1FFFF)
#define CHANCE_AFTER(chance) (((chance) >> 31) & 1)
#define CHANCE_CODES(chance) ((chance) >> 32)

/* device: number of removals << 2 | sticky << 1 | absent */
#define DEVICE_ABSENT(device) ((device) & 1)
#define DEVICE_STICKY(device) (((device) >> 1) & 1)
#define DEVICE_REMOVALS(device) ((device) >> 2)

struct function_control {
    counter calls;        /* shim */
    counter injected;     /* shim */
    counter rule;         /* test; the shim clears a RULE_ONCE that fired */
    counter rule_start;   /* test: calls when the rule was made */
    counter chance;       /* test */
    counter chance_start; /* test: calls when the chance was set */
    counter seed;         /* test */
    counter latency;      /* test: microseconds */
    _Atomic uint32_t codes[CODES_MAX]; /* test */
};
static_assert(sizeof(struct function_control) == 128, "layout");

/* What one process holds. Absolute numbers, so nothing drifts when a process is killed. */
struct process_share {
    counter pid; /* 0: free */
    counter sessions;
    counter session_objects;
};
static_assert(sizeof(struct process_share) == 24, "layout");

struct control {
    uint32_t magic, version;
    uint64_t size;
    counter device; /* test */
    counter restrictions; /* test: bits of enum restriction */
    counter vendor; /* test: the one of vendor.h that is played */
    char pin[PIN_MAX]; /* test, before the restrictions: what is typed at the token's PIN pad */
    counter kill_calls;   /* test: the process that makes the last of so many calls is killed before it */
    counter kill_changes; /* test: the same for token objects made and destroyed, and after it */
    /* All that follows, but for the test's fields of struct function_control: shim. */
    counter session_high_water;
    counter concurrent_high_water;
    counter token_objects_created;
    counter token_objects_destroyed;
    counter initialized_with_locking;
    counter initialized_without_locking;
    counter session_conflicts;
    counter finalize_conflicts;
    counter uninitialized_calls;
    counter processes_refused;
    struct function_control function[FUNCTION_COUNT];
    struct process_share process[PROCESSES_MAX];
};
static_assert(offsetof(struct control, function) == 200, "layout");
static_assert(offsetof(struct control, process) == 200 + 128 * 68, "68 functions in v2.40");
static_assert(sizeof(struct control) == 200 + 128 * 68 + 24 * PROCESSES_MAX, "layout");

static inline void raise_high_water(counter *mark, uint64_t value)
{
    uint64_t seen = atomic_load(mark);
    while (seen < value && !atomic_compare_exchange_weak(mark, &seen, value))
        ;
}

#endif
