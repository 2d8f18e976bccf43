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
    CKA_CLASS = 0x00,
    CKA_TOKEN = 0x01,
    CKA_PRIVATE = 0x02,
    CKA_VALUE = 0x11,
    CKA_KEY_TYPE = 0x100,
    CKA_SUBJECT = 0x101,
    CKA_SENSITIVE = 0x103,
    CKA_DECRYPT = 0x105,
    CKA_UNWRAP = 0x107,
    CKA_DERIVE = 0x10C,
    CKA_VALUE_LEN = 0x161,
    CKA_EXTRACTABLE = 0x162,
    CKA_MODIFIABLE = 0x170,
    CKA_COPYABLE = 0x171,
    CKA_EC_PARAMS = 0x180,
    CKA_EC_POINT = 0x181,
    CKA_TRUSTED = 0x86,
    CKA_WRAP_WITH_TRUSTED = 0x210,
    CKA_UNWRAP_TEMPLATE = 0x40000212,
    CKA_ALLOWED_MECHANISMS = 0x40000600,
};
enum { CKO_PUBLIC_KEY = 0x02, CKO_PRIVATE_KEY = 0x03, CKO_SECRET_KEY = 0x04 };
enum { CKK_EC = 0x03, CKK_GENERIC_SECRET = 0x10, CKK_AES = 0x1F, CKK_SHA256_HMAC = 0x2B };
enum {
    CKM_RSA_PKCS = 0x01,
    CKM_RSA_X_509 = 0x03,
    CKM_RSA_PKCS_OAEP = 0x09,
    CKM_SHA256_HMAC = 0x251,
    CKM_EC_KEY_PAIR_GEN = 0x1040,
    CKM_ECDH1_DERIVE = 0x1050,
    CKM_AES_ECB = 0x1081,
    CKM_AES_CBC = 0x1082,
    CKM_AES_CTR = 0x1086,
    CKM_AES_GCM = 0x1087,
    CKM_AES_KEY_WRAP_PAD = 0x210A,
    CKM_AES_KEY_WRAP_KWP = 0x210B,
};
enum {
    CKR_OK = 0x00,
    CKR_GENERAL_ERROR = 0x05,
    CKR_FUNCTION_FAILED = 0x06,
    CKR_ARGUMENTS_BAD = 0x07,
    CKR_ATTRIBUTE_READ_ONLY = 0x10,
    CKR_ATTRIBUTE_TYPE_INVALID = 0x12,
    CKR_ATTRIBUTE_VALUE_INVALID = 0x13,
    CKR_DEVICE_REMOVED = 0x32,
    CKR_ENCRYPTED_DATA_INVALID = 0x40,
    CKR_FUNCTION_NOT_SUPPORTED = 0x54,
    CKR_KEY_TYPE_INCONSISTENT = 0x63,
    CKR_KEY_FUNCTION_NOT_PERMITTED = 0x68,
    CKR_MECHANISM_INVALID = 0x70,
    CKR_MECHANISM_PARAM_INVALID = 0x71,
    CKR_OPERATION_ACTIVE = 0x90,
    CKR_SESSION_COUNT = 0xB1,
    CKR_TEMPLATE_INCONSISTENT = 0xD1,
    CKR_TOKEN_NOT_PRESENT = 0xE0,
    CKR_USER_ALREADY_LOGGED_IN = 0x100,
    CKR_USER_NOT_LOGGED_IN = 0x101,
    CKR_WRAPPED_KEY_INVALID = 0x110,
    CKR_WRAPPED_KEY_LEN_RANGE = 0x112,
    CKR_DOMAIN_PARAMS_INVALID = 0x130,
    CKR_BUFFER_TOO_SMALL = 0x150,
    CKR_CRYPTOKI_ALREADY_INITIALIZED = 0x191,
};
enum { CKF_PROTECTED_AUTHENTICATION_PATH = 0x100 };

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

struct ck_mechanism {
    CK_ULONG mechanism;
    const void *parameter;
    CK_ULONG length;
};

struct ck_mechanism_info {
    CK_ULONG least, most, flags;
};

struct ck_slot_info {
    unsigned char description[64], manufacturer[32];
    CK_ULONG flags;
    struct ck_version hardware, firmware;
};

struct ck_session_info {
    CK_ULONG slot, state, flags, device_error;
};

struct ck_token_info {
    unsigned char label[32], manufacturer[32], model[16], serial[16];
    CK_ULONG flags;
};

struct ck_initialize_args {
    const void *create_mutex, *destroy_mutex, *lock_mutex, *unlock_mutex;
    CK_ULONG flags;
    void *reserved;
};

/* Performs a call; what lies between the shim's table and the real module is a chain of these. */
typedef CK_RV (*forward)(enum function_id id, const word a[]);

/* Called through a cast to the type that the arity gives. */
typedef void (*ck_function)(void);

struct ck_function_list {
    struct ck_version version;
    ck_function function[FUNCTION_COUNT];
};

#endif
