/* PKCS#11 v2.40, CK_FUNCTION_LIST, in its order: name, number of arguments, what it talks to.
 * The Python side reads the names from this file.
 *
 *   LIBRARY  the module itself; works without a device
 *   SLOT     the reader; works without a device and tells that it is gone
 *   TOKEN    the device, named by a slot id
 *   SESSION  the device, by a session handle as first argument
 */
#ifndef HSMWRAP_FUNCTIONS_H
#define HSMWRAP_FUNCTIONS_H

#define FUNCTIONS(X)                    \
    X(C_Initialize, 1, LIBRARY)         \
    X(C_Finalize, 1, LIBRARY)           \
    X(C_GetInfo, 1, LIBRARY)            \
    X(C_GetFunctionList, 1, LIBRARY)    \
    X(C_GetSlotList, 3, SLOT)           \
    X(C_GetSlotInfo, 2, SLOT)           \
    X(C_GetTokenInfo, 2, TOKEN)         \
    X(C_GetMechanismList, 3, TOKEN)     \
    X(C_GetMechanismInfo, 3, TOKEN)     \
    X(C_InitToken, 4, TOKEN)            \
    X(C_InitPIN, 3, SESSION)            \
    X(C_SetPIN, 5, SESSION)             \
    X(C_OpenSession, 5, TOKEN)          \
    X(C_CloseSession, 1, SESSION)       \
    X(C_CloseAllSessions, 1, TOKEN)     \
    X(C_GetSessionInfo, 2, SESSION)     \
    X(C_GetOperationState, 3, SESSION)  \
    X(C_SetOperationState, 5, SESSION)  \
    X(C_Login, 4, SESSION)              \
    X(C_Logout, 1, SESSION)             \
    X(C_CreateObject, 4, SESSION)       \
    X(C_CopyObject, 5, SESSION)         \
    X(C_DestroyObject, 2, SESSION)      \
    X(C_GetObjectSize, 3, SESSION)      \
    X(C_GetAttributeValue, 4, SESSION)  \
    X(C_SetAttributeValue, 4, SESSION)  \
    X(C_FindObjectsInit, 3, SESSION)    \
    X(C_FindObjects, 4, SESSION)        \
    X(C_FindObjectsFinal, 1, SESSION)   \
    X(C_EncryptInit, 3, SESSION)        \
    X(C_Encrypt, 5, SESSION)            \
    X(C_EncryptUpdate, 5, SESSION)      \
    X(C_EncryptFinal, 3, SESSION)       \
    X(C_DecryptInit, 3, SESSION)        \
    X(C_Decrypt, 5, SESSION)            \
    X(C_DecryptUpdate, 5, SESSION)      \
    X(C_DecryptFinal, 3, SESSION)       \
    X(C_DigestInit, 2, SESSION)         \
    X(C_Digest, 5, SESSION)             \
    X(C_DigestUpdate, 3, SESSION)       \
    X(C_DigestKey, 2, SESSION)          \
    X(C_DigestFinal, 3, SESSION)        \
    X(C_SignInit, 3, SESSION)           \
    X(C_Sign, 5, SESSION)               \
    X(C_SignUpdate, 3, SESSION)         \
    X(C_SignFinal, 3, SESSION)          \
    X(C_SignRecoverInit, 3, SESSION)    \
    X(C_SignRecover, 5, SESSION)        \
    X(C_VerifyInit, 3, SESSION)         \
    X(C_Verify, 5, SESSION)             \
    X(C_VerifyUpdate, 3, SESSION)       \
    X(C_VerifyFinal, 3, SESSION)        \
    X(C_VerifyRecoverInit, 3, SESSION)  \
    X(C_VerifyRecover, 5, SESSION)      \
    X(C_DigestEncryptUpdate, 5, SESSION)\
    X(C_DecryptDigestUpdate, 5, SESSION)\
    X(C_SignEncryptUpdate, 5, SESSION)  \
    X(C_DecryptVerifyUpdate, 5, SESSION)\
    X(C_GenerateKey, 5, SESSION)        \
    X(C_GenerateKeyPair, 8, SESSION)    \
    X(C_WrapKey, 6, SESSION)            \
    X(C_UnwrapKey, 8, SESSION)          \
    X(C_DeriveKey, 6, SESSION)          \
    X(C_SeedRandom, 3, SESSION)         \
    X(C_GenerateRandom, 3, SESSION)     \
    X(C_GetFunctionStatus, 1, SESSION)  \
    X(C_CancelFunction, 1, SESSION)     \
    X(C_WaitForSlotEvent, 3, LIBRARY)

#define FUNCTION_ID(name, arity, kind) FN_##name,
enum function_id { FUNCTIONS(FUNCTION_ID) FUNCTION_COUNT };
#undef FUNCTION_ID

enum function_kind { LIBRARY, SLOT, TOKEN, SESSION };

#endif
