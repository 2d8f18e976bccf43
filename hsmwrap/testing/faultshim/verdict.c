#include "verdict.h"

/* A rule and its start count are two words: read until both belong together. */
static uint64_t read_rule(struct function_control *function, uint64_t *start)
{
    for (;;) {
        uint64_t rule = atomic_load(&function->rule);
        *start = atomic_load(&function->rule_start);
        if (atomic_load(&function->rule) == rule)
            return rule;
    }
}

static bool rule_fires(struct function_control *function, uint64_t rule, uint64_t ordinal)
{
    switch (RULE_MODE(rule)) {
    case RULE_ONCE:
        /* The call that clears the rule gets the fault: exactly one, however many are running. */
        return ordinal >= RULE_COUNT(rule)
            && atomic_compare_exchange_strong(&function->rule, &rule, RULE_OFF);
    case RULE_EVERY:
        return ordinal % RULE_COUNT(rule) == 0;
    default:
        return false;
    }
}

/* Steele, Lea, Flood: Fast splittable pseudorandom number generators (2014). */
static uint64_t splitmix64(uint64_t seed, uint64_t step)
{
    uint64_t z = seed + step * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

/* A pure function of seed, function and call number, so independent of thread scheduling. */
static struct verdict by_chance(struct function_control *function, enum function_id id, uint64_t call)
{
    uint64_t chance = atomic_load(&function->chance);
    if (CHANCE_CODES(chance) == 0)
        return (struct verdict){CKR_OK, false};
    uint64_t ordinal = call - atomic_load(&function->chance_start);
    uint64_t drawn = splitmix64(atomic_load(&function->seed), ordinal * FUNCTION_COUNT + id);
    if ((drawn & 0xFFFF) >= CHANCE_PROBABILITY(chance))
        return (struct verdict){CKR_OK, false};
    size_t index = (drawn >> 16) % CHANCE_CODES(chance) % CODES_MAX;
    return (struct verdict){atomic_load(&function->codes[index]), CHANCE_AFTER(chance)};
}

struct verdict verdict_of(struct control *control, enum function_id id, uint64_t call)
{
    struct function_control *function = &control->function[id];
    uint64_t start, rule = read_rule(function, &start);
    /* A call counted before the rule was made and judged after is not affected by it. */
    struct verdict verdict = call > start && rule_fires(function, rule, call - start)
        ? (struct verdict){RULE_CODE(rule), RULE_AFTER(rule)}
        : by_chance(function, id, call);
    if (verdict.code != CKR_OK)
        atomic_fetch_add(&function->injected, 1);
    return verdict;
}
