/* Looking into templates. */
#ifndef HSMWRAP_ATTRIBUTES_H
#define HSMWRAP_ATTRIBUTES_H

#include <stdbool.h>
#include <string.h>

#include "cryptoki.h"

static inline const struct ck_attribute *find(const struct ck_attribute *list, CK_ULONG count, CK_ULONG type)
{
    for (CK_ULONG i = 0; list && i < count; i++)
        if (list[i].type == type && list[i].value)
            return &list[i];
    return NULL;
}

static inline bool says(const struct ck_attribute *list, CK_ULONG count, CK_ULONG type, bool value)
{
    const struct ck_attribute *found = find(list, count, type);
    return found && found->length == 1 && (*(const unsigned char *)found->value != 0) == value;
}

static inline bool is_number(const struct ck_attribute *attribute, CK_ULONG number)
{
    return attribute && attribute->length == sizeof number
        && memcmp(attribute->value, &number, sizeof number) == 0;
}

#endif
