/* What the module cannot do while it plays another token: each a bit of control->restrictions.
 * hsmwrap/testing/faults.py says what each means, in the same order.
 */
#ifndef HSMWRAP_RESTRICTIONS_H
#define HSMWRAP_RESTRICTIONS_H

#include "control.h"
#include "cryptoki.h"

#define RESTRICTIONS(X)             \
    X(NO_SESSION_OBJECTS)           \
    X(NO_EXTRACTABLE_PRIVATE_KEYS)  \
    X(NO_READABLE_KEYS)             \
    X(NO_SECRET_KEY_CREATION)       \
    X(NO_HARDENING)                 \
    X(NO_AES_ECB)                   \
    X(NO_AES_CBC)                   \
    X(NO_AES_CTR)                   \
    X(NO_AES_GCM)                   \
    X(NO_AES_KEY_WRAP)              \
    X(KEY_WRAP_PAD_ONLY)            \
    X(KEY_WRAP_KWP_ONLY)            \
    X(NO_RSA_UNWRAP)                \
    X(NO_RSA_DECRYPT)               \
    X(NO_RAW_RSA)                   \
    X(NO_ECDH)                      \
    X(OAEP_SOURCE_ZERO)             \
    X(HMAC_KEYS_ONLY)               \
    X(ONE_SESSION)                  \
    X(LOGIN_PER_SESSION)            \
    X(BLANK_LABEL)                  \
    X(PIN_PAD)                      \
    X(EC_POINT_RAW)                 \
    X(EC_POINT_XY)                  \
    X(EC_POINT_BIT_STRING)          \
    X(UNWRAP_IGNORES_PROTECTION)    \
    X(UNWRAP_TEMPLATE_IGNORED)      \
    X(ALLOWED_MECHANISMS_IGNORED)   \
    X(COPYABLE_IGNORED)             \
    X(MODIFIABLE_IGNORED)           \
    X(WRAP_WITH_TRUSTED_IGNORED)    \
    X(NO_TRUST)                     \
    X(NO_AES)                       \
    X(NO_RSA)                       \
    X(TRUSTED_ASKS_FOR_LOGIN)

#define RESTRICTION_NUMBER(name) NUMBER_##name,
enum { RESTRICTIONS(RESTRICTION_NUMBER) RESTRICTION_COUNT };
#undef RESTRICTION_NUMBER
#define RESTRICTION(name) name = UINT64_C(1) << NUMBER_##name,
enum restriction { RESTRICTIONS(RESTRICTION) };
#undef RESTRICTION

/* Performs a call as the token that is played does; ``arity``: number of its arguments. */
CK_RV restricted_call(struct control *control, enum function_id id, unsigned arity,
                      const word a[], forward call);

void restrictions_after_fork_in_child(void);

#endif
