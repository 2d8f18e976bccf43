/* The few PKCS#11 v2.40 types that the shim looks into. Every other argument only passes through. */
#ifndef HSMWRAP_CRYPTOKI_H
#define HSMWRAP_CRYPTOKI_H

#include <assert.h>
#include <stdint.h>

#include "functions.h"

typedef unsigned long CK_ULONG;
typedef CK_ULONG CK_RV;

/* Every argument of every function is a pointer, a CK_ULONG or narrower: one machine word. */
typedef uintptr_t word;
static_assert(sizeof(word) == sizeof(CK_ULONG), "a CK_ULONG is not a machine word here");

enum {
    CKR_OK = 0x00,
    CKR_GENERAL_ERROR = 0x05,
    CKR_ARGUMENTS_BAD = 0x07,
    CKR_DEVICE_REMOVED = 0x32,
    CKR_FUNCTION_NOT_SUPPORTED = 0x54,
    CKR_TOKEN_NOT_PRESENT = 0xE0,
    CKR_CRYPTOKI_ALREADY_INITIALIZED = 0x191,
};

enum { CKA_TOKEN = 0x01 };
enum { CKF_TOKEN_PRESENT = 0x01 };  /* CK_SLOT_INFO.flags */
enum { CKF_OS_LOCKING_OK = 0x02 };  /* CK_C_INITIALIZE_ARGS.flags */

struct ck_version {
    unsigned char major, minor;
};

struct ck_attribute {
    CK_ULONG type;
    const void *value;
    CK_ULONG length;
};

struct ck_slot_info {
    unsigned char description[64], manufacturer[32];
    CK_ULONG flags;
    struct ck_version hardware, firmware;
};

struct ck_initialize_args {
    const void *create_mutex, *destroy_mutex, *lock_mutex, *unlock_mutex;
    CK_ULONG flags;
    void *reserved;
};

/* Called through a cast to the type that the arity gives. */
typedef void (*ck_function)(void);

struct ck_function_list {
    struct ck_version version;
    ck_function function[FUNCTION_COUNT];
};

#endif
