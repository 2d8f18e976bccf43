/* Where functions that make objects take templates from and put handles to, by argument. */
#ifndef HSMWRAP_MAKERS_H
#define HSMWRAP_MAKERS_H

#include "functions.h"

static const struct maker {
    enum function_id id;
    unsigned char template, count, handle;
} makers[] = {
    {FN_C_CreateObject, 1, 2, 3},    {FN_C_CopyObject, 2, 3, 4},
    {FN_C_GenerateKey, 2, 3, 4},     {FN_C_GenerateKeyPair, 2, 3, 6},
    {FN_C_GenerateKeyPair, 4, 5, 7}, {FN_C_UnwrapKey, 5, 6, 7},
    {FN_C_DeriveKey, 3, 4, 5},
};
enum { MAKERS = sizeof makers / sizeof *makers };

/* What follows is done for each template of this function. */
#define FOR_MAKERS(maker, of)                                                      \
    for (const struct maker *maker = makers; maker < makers + MAKERS; maker++)     \
        if (maker->id == (of))

#endif
