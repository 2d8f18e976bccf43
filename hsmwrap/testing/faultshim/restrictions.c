#define _GNU_SOURCE /* strnlen */
#include "restrictions.h"

#include <pthread.h>
#include <stdbool.h>
#include <string.h>

#include "attributes.h"
#include "ledger.h"
#include "makers.h"

enum { ATTRIBUTES_MAX = 64, MECHANISMS_MAX = 32, POINT_MAX = 256, ARITY_MAX = 8 };

struct ck_oaep_params {
    CK_ULONG hash, mgf, source;
    const void *data;
    CK_ULONG length;
};

/* A template as the real module gets it. */
struct template {
    struct ck_attribute attribute[ATTRIBUTES_MAX];
    CK_ULONG count;
    CK_ULONG mechanisms[MECHANISMS_MAX];
};

static const unsigned char no = 0, yes = 1;
static const CK_ULONG generic_secret = CKK_GENERIC_SECRET;
/* By its CKA_ALLOWED_MECHANISMS the shim knows a generic secret again that it made for a
 * CKK_SHA256_HMAC key. */
static const CK_ULONG hmac_mark = CKM_SHA256_HMAC;

/* --- templates ----------------------------------------------------------------------------- */

static void append(struct template *to, CK_ULONG type, const void *value, CK_ULONG length)
{
    if (to->count < ATTRIBUTES_MAX)
        to->attribute[to->count++] = (struct ck_attribute){type, value, length};
}

static void append_mechanisms(struct template *to, const struct ck_attribute *from)
{
    CK_ULONG count = from->length / sizeof(CK_ULONG);
    if (!from->value || count > MECHANISMS_MAX) {
        append(to, from->type, from->value, from->length);
        return;
    }
    memcpy(to->mechanisms, from->value, from->length);
    for (CK_ULONG i = 0; i < count; i++)
        if (to->mechanisms[i] == CKM_AES_KEY_WRAP_KWP)
            to->mechanisms[i] = CKM_AES_KEY_WRAP_PAD;
    append(to, from->type, to->mechanisms, from->length);
}

static const struct {
    uint64_t restrictions;
    CK_ULONG type;
} ignored[] = {
    {UNWRAP_TEMPLATE_IGNORED | UNWRAP_IGNORES_PROTECTION, CKA_UNWRAP_TEMPLATE},
    {ALLOWED_MECHANISMS_IGNORED, CKA_ALLOWED_MECHANISMS},
    {COPYABLE_IGNORED, CKA_COPYABLE},
    {MODIFIABLE_IGNORED, CKA_MODIFIABLE},
    {WRAP_WITH_TRUSTED_IGNORED, CKA_WRAP_WITH_TRUSTED},
};

static bool is_ignored(uint64_t set, CK_ULONG type)
{
    for (size_t i = 0; i < sizeof ignored / sizeof *ignored; i++)
        if ((set & ignored[i].restrictions) && ignored[i].type == type)
            return true;
    return false;
}

static void rewrite(uint64_t set, enum function_id id, const struct ck_attribute *from,
                    CK_ULONG count, struct template *to)
{
    bool unprotected = (set & UNWRAP_IGNORES_PROTECTION) && id == FN_C_UnwrapKey;
    if (unprotected) { /* first: SoftHSM takes none after CKA_MODIFIABLE */
        append(to, CKA_SENSITIVE, &no, sizeof no);
        append(to, CKA_EXTRACTABLE, &yes, sizeof yes);
    }
    for (CK_ULONG i = 0; from && i < count; i++) {
        CK_ULONG type = from[i].type;
        if (is_ignored(set, type)
            || (unprotected && (type == CKA_SENSITIVE || type == CKA_EXTRACTABLE)))
            continue;
        if ((set & HMAC_KEYS_ONLY) && type == CKA_KEY_TYPE && is_number(&from[i], CKK_SHA256_HMAC)) {
            append(to, type, &generic_secret, sizeof generic_secret);
            if (id != FN_C_FindObjectsInit)
                append(to, CKA_ALLOWED_MECHANISMS, &hmac_mark, sizeof hmac_mark);
        } else if ((set & KEY_WRAP_KWP_ONLY) && type == CKA_ALLOWED_MECHANISMS) {
            append_mechanisms(to, &from[i]);
        } else {
            append(to, type, from[i].value, from[i].length);
        }
    }
}

static bool is_of_trust(CK_ULONG type)
{
    return type == CKA_UNWRAP_TEMPLATE || type == CKA_TRUSTED || type == CKA_WRAP_WITH_TRUSTED
        || type == CKA_ALLOWED_MECHANISMS;
}

static CK_RV refused_template(uint64_t set, const struct maker *maker, const word a[])
{
    const struct ck_attribute *list = (const struct ck_attribute *)a[maker->template];
    CK_ULONG count = a[maker->count];
    bool private = maker->id == FN_C_GenerateKeyPair
        ? maker->template == 4
        : is_number(find(list, count, CKA_CLASS), CKO_PRIVATE_KEY);
    if ((set & NO_HARDENING)
        && (find(list, count, CKA_UNWRAP_TEMPLATE) || find(list, count, CKA_ALLOWED_MECHANISMS)
            || find(list, count, CKA_COPYABLE) || find(list, count, CKA_MODIFIABLE)))
        return CKR_ATTRIBUTE_TYPE_INVALID;
    for (CK_ULONG i = 0; (set & NO_TRUST) && list && i < count; i++)
        if (is_of_trust(list[i].type))
            return CKR_ATTRIBUTE_TYPE_INVALID;
    if ((set & TRUSTED_ASKS_FOR_LOGIN) && says(list, count, CKA_TRUSTED, true))
        return CKR_USER_NOT_LOGGED_IN;
    if ((set & NO_SESSION_OBJECTS) && maker->id != FN_C_CopyObject
        && !says(list, count, CKA_TOKEN, true))
        return CKR_ATTRIBUTE_VALUE_INVALID;
    if ((set & NO_EXTRACTABLE_PRIVATE_KEYS) && private && says(list, count, CKA_EXTRACTABLE, true))
        return CKR_ATTRIBUTE_VALUE_INVALID;
    if ((set & NO_READABLE_KEYS) && says(list, count, CKA_SENSITIVE, false))
        return CKR_ATTRIBUTE_VALUE_INVALID;
    if ((set & NO_AES) && is_number(find(list, count, CKA_KEY_TYPE), CKK_AES))
        return CKR_ATTRIBUTE_VALUE_INVALID;
    if ((set & NO_SECRET_KEY_CREATION) && maker->id == FN_C_CreateObject
        && is_number(find(list, count, CKA_CLASS), CKO_SECRET_KEY))
        return CKR_ATTRIBUTE_VALUE_INVALID;
    return CKR_OK;
}

/* --- mechanisms ---------------------------------------------------------------------------- */

static bool has_mechanism(enum function_id id)
{
    switch (id) {
    case FN_C_EncryptInit:
    case FN_C_DecryptInit:
    case FN_C_SignInit:
    case FN_C_VerifyInit:
    case FN_C_GenerateKey:
    case FN_C_GenerateKeyPair:
    case FN_C_WrapKey:
    case FN_C_UnwrapKey:
    case FN_C_DeriveKey: return true;
    default: return false;
    }
}

static const struct {
    uint64_t restrictions;
    CK_ULONG mechanism;
    enum function_id only; /* C_Initialize: every function */
} missing[] = {
    {NO_AES_ECB, CKM_AES_ECB, FN_C_Initialize},
    {NO_AES_CBC, CKM_AES_CBC, FN_C_Initialize},
    {NO_AES_CTR, CKM_AES_CTR, FN_C_Initialize},
    {NO_AES_GCM, CKM_AES_GCM, FN_C_Initialize},
    {NO_RAW_RSA, CKM_RSA_X_509, FN_C_Initialize},
    {NO_ECDH, CKM_ECDH1_DERIVE, FN_C_Initialize},
    {NO_AES_KEY_WRAP | KEY_WRAP_KWP_ONLY, CKM_AES_KEY_WRAP_PAD, FN_C_Initialize},
    {NO_AES_KEY_WRAP | KEY_WRAP_PAD_ONLY, CKM_AES_KEY_WRAP_KWP, FN_C_Initialize},
    {NO_RSA_UNWRAP, CKM_RSA_PKCS, FN_C_UnwrapKey},
    {NO_RSA_UNWRAP, CKM_RSA_PKCS_OAEP, FN_C_UnwrapKey},
    {NO_RSA_DECRYPT, CKM_RSA_PKCS, FN_C_DecryptInit},
    {NO_RSA_DECRYPT, CKM_RSA_PKCS_OAEP, FN_C_DecryptInit},
};

/* CKM_AES_KEY_GEN and its like, of derivation by AES, and of CKM_AES_OFB to key wrap. */
static bool is_aes(CK_ULONG mechanism)
{
    return (mechanism >= 0x1080 && mechanism <= 0x108F) || mechanism == 0x1104
        || mechanism == 0x1105 || (mechanism >= 0x2104 && mechanism <= CKM_AES_KEY_WRAP_KWP);
}

static bool is_hmac_key(const word a[], CK_ULONG object, forward call)
{
    CK_ULONG allowed = 0;
    struct ck_attribute read = {CKA_ALLOWED_MECHANISMS, &allowed, sizeof allowed};
    CK_RV rv = call(FN_C_GetAttributeValue, (const word[]){a[0], object, (word)&read, 1});
    return rv == CKR_OK && is_number(&read, hmac_mark);
}

static CK_RV refused_mechanism(uint64_t set, enum function_id id, const word a[], forward call)
{
    const struct ck_mechanism *used = (const struct ck_mechanism *)a[1];
    if (!used)
        return CKR_OK;
    if (((set & NO_AES) && is_aes(used->mechanism)) || ((set & NO_RSA) && used->mechanism <= 0x0E))
        return CKR_MECHANISM_INVALID;
    for (size_t i = 0; i < sizeof missing / sizeof *missing; i++)
        if ((set & missing[i].restrictions) && used->mechanism == missing[i].mechanism
            && (missing[i].only == FN_C_Initialize || missing[i].only == id))
            return CKR_MECHANISM_INVALID;
    if ((set & OAEP_SOURCE_ZERO) && used->mechanism == CKM_RSA_PKCS_OAEP
        && used->length == sizeof(struct ck_oaep_params)
        && ((const struct ck_oaep_params *)used->parameter)->source != 0)
        return CKR_MECHANISM_PARAM_INVALID;
    if ((set & HMAC_KEYS_ONLY) && used->mechanism == CKM_SHA256_HMAC && !is_hmac_key(a, a[2], call))
        return CKR_KEY_TYPE_INCONSISTENT;
    return CKR_OK;
}

/* --- sessions and logins ------------------------------------------------------------------- */

enum { SESSIONS_MAX = 1024 };
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static CK_ULONG logged_in[SESSIONS_MAX];
static size_t logins, opening;

static bool is_logged_in(CK_ULONG session)
{
    bool found = false;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < logins; i++)
        found |= logged_in[i] == session;
    pthread_mutex_unlock(&lock);
    return found;
}

static void set_login(CK_ULONG session, bool login)
{
    pthread_mutex_lock(&lock);
    for (size_t i = logins; i-- > 0;)
        if (logged_in[i] == session)
            logged_in[i] = logged_in[--logins];
    if (login && logins < SESSIONS_MAX)
        logged_in[logins++] = session;
    pthread_mutex_unlock(&lock);
}

static void forget_logins(void)
{
    pthread_mutex_lock(&lock);
    logins = 0;
    pthread_mutex_unlock(&lock);
}

void restrictions_after_fork_in_child(void)
{
    pthread_mutex_init(&lock, NULL);
    logins = opening = 0;
}

static bool needs_login(enum function_id id)
{
    return id == FN_C_CreateObject || (has_mechanism(id) && id != FN_C_VerifyInit);
}

static CK_RV log_in(struct control *control, uint64_t set, const word given[], forward call)
{
    word a[] = {given[0], given[1], given[2], given[3]};
    if (set & PIN_PAD) {
        if (a[2])
            return CKR_ARGUMENTS_BAD;
        a[2] = (word)control->pin;
        a[3] = strnlen(control->pin, sizeof control->pin);
    }
    CK_RV rv = call(FN_C_Login, a);
    if (!(set & LOGIN_PER_SESSION))
        return rv;
    if (rv == CKR_USER_ALREADY_LOGGED_IN && !is_logged_in(a[0]))
        rv = CKR_OK;
    if (rv == CKR_OK)
        set_login(a[0], true);
    return rv;
}

static CK_RV log_out(const word a[], forward call)
{
    if (!is_logged_in(a[0]))
        return CKR_USER_NOT_LOGGED_IN;
    set_login(a[0], false);
    pthread_mutex_lock(&lock);
    bool last = logins == 0;
    pthread_mutex_unlock(&lock);
    return last ? call(FN_C_Logout, a) : CKR_OK;
}

static CK_RV open_session(const word a[], forward call)
{
    pthread_mutex_lock(&lock);
    bool full = ledger_sessions() + opening > 0;
    opening += !full;
    pthread_mutex_unlock(&lock);
    if (full)
        return CKR_SESSION_COUNT;
    CK_RV rv = call(FN_C_OpenSession, a);
    pthread_mutex_lock(&lock);
    opening--;
    pthread_mutex_unlock(&lock);
    return rv;
}

/* Takes the private objects from what a search without login has found. */
static void hide_private_objects(const word a[], forward call)
{
    CK_ULONG *found = (CK_ULONG *)a[1], *count = (CK_ULONG *)a[3], kept = 0;
    for (CK_ULONG i = 0; i < *count; i++) {
        unsigned char private = 1;
        struct ck_attribute read = {CKA_PRIVATE, &private, sizeof private};
        call(FN_C_GetAttributeValue, (const word[]){a[0], found[i], (word)&read, 1});
        if (!private)
            found[kept++] = found[i];
    }
    *count = kept;
}

/* --- attributes ---------------------------------------------------------------------------- */

/* From a DER OCTET STRING of an uncompressed point with coordinates of 32 bytes. */
static CK_ULONG reshape(uint64_t set, unsigned char point[POINT_MAX], CK_ULONG length)
{
    static const unsigned char bit_string[] = {0x03, 0x42, 0x00};
    if (length != 67)
        return length;
    if (set & EC_POINT_BIT_STRING) {
        memmove(point + sizeof bit_string, point + 2, 65);
        memcpy(point, bit_string, sizeof bit_string);
        return sizeof bit_string + 65;
    }
    CK_ULONG head = set & EC_POINT_XY ? 3 : 2;
    memmove(point, point + head, length - head);
    return length - head;
}

static CK_RV give_point(uint64_t set, struct ck_attribute *to, unsigned char point[POINT_MAX],
                        CK_ULONG length)
{
    length = reshape(set, point, length);
    bool fits = !to->value || to->length >= length;
    if (to->value && fits)
        memcpy((void *)to->value, point, length);
    to->length = fits ? length : (CK_ULONG)-1;
    return fits ? CKR_OK : CKR_BUFFER_TOO_SMALL;
}

static void give_mechanisms(struct ck_attribute *to)
{
    CK_ULONG *mechanisms = (CK_ULONG *)to->value;
    for (CK_ULONG i = 0; mechanisms && i < to->length / sizeof *mechanisms; i++)
        if (mechanisms[i] == CKM_AES_KEY_WRAP_PAD)
            mechanisms[i] = CKM_AES_KEY_WRAP_KWP;
}

static CK_RV get_attributes(uint64_t set, const word a[], forward call)
{
    enum { POINTS = EC_POINT_RAW | EC_POINT_XY | EC_POINT_BIT_STRING };
    struct ck_attribute *to = (struct ck_attribute *)a[2], read[ATTRIBUTES_MAX];
    unsigned char point[POINT_MAX];
    if (!to || a[3] > ATTRIBUTES_MAX)
        return call(FN_C_GetAttributeValue, a);
    for (CK_ULONG i = 0; i < a[3]; i++) {
        read[i] = to[i];
        if ((set & POINTS) && to[i].type == CKA_EC_POINT)
            read[i] = (struct ck_attribute){CKA_EC_POINT, point, sizeof point};
        if ((set & NO_TRUST) && is_of_trust(to[i].type))
            read[i] = (struct ck_attribute){CKA_CLASS, NULL, 0};
    }
    CK_RV without = CKR_OK;
    CK_RV rv = call(FN_C_GetAttributeValue, (const word[]){a[0], a[1], (word)read, a[3]});
    for (CK_ULONG i = 0; i < a[3]; i++) {
        if ((set & POINTS) && to[i].type == CKA_EC_POINT && read[i].length != (CK_ULONG)-1) {
            CK_RV given = give_point(set, &to[i], point, read[i].length);
            rv = rv == CKR_OK ? given : rv;
            continue;
        }
        if ((set & NO_TRUST) && is_of_trust(to[i].type)) {
            to[i].length = (CK_ULONG)-1;
            without = CKR_ATTRIBUTE_TYPE_INVALID;
            continue;
        }
        to[i].length = read[i].length;
        if (rv != CKR_OK || !to[i].value)
            continue;
        if ((set & KEY_WRAP_KWP_ONLY) && to[i].type == CKA_ALLOWED_MECHANISMS)
            give_mechanisms(&to[i]);
        if ((set & HMAC_KEYS_ONLY) && to[i].type == CKA_KEY_TYPE
            && is_number(&to[i], CKK_GENERIC_SECRET) && is_hmac_key(a, a[1], call))
            *(CK_ULONG *)to[i].value = CKK_SHA256_HMAC;
    }
    return rv == CKR_OK ? without : rv;
}

/* --- one call ------------------------------------------------------------------------------ */

static CK_RV call_changed(uint64_t set, enum function_id id, word a[], forward call)
{
    struct template template[2] = {{.count = 0}, {.count = 0}};
    struct ck_mechanism mechanism;
    struct ck_oaep_params oaep;
    size_t used = 0;
    FOR_MAKERS(maker, id) {
        struct template *to = &template[used++];
        rewrite(set, id, (const struct ck_attribute *)a[maker->template], a[maker->count], to);
        a[maker->template] = (word)to->attribute;
        a[maker->count] = to->count;
    }
    if (id == FN_C_FindObjectsInit) {
        rewrite(set, id, (const struct ck_attribute *)a[1], a[2], &template[0]);
        a[1] = (word)template[0].attribute;
        a[2] = template[0].count;
    }
    if (has_mechanism(id) && a[1]) {
        mechanism = *(const struct ck_mechanism *)a[1];
        if ((set & KEY_WRAP_KWP_ONLY) && mechanism.mechanism == CKM_AES_KEY_WRAP_KWP)
            mechanism.mechanism = CKM_AES_KEY_WRAP_PAD;
        if ((set & OAEP_SOURCE_ZERO) && mechanism.mechanism == CKM_RSA_PKCS_OAEP
            && mechanism.length == sizeof oaep) {
            oaep = *(const struct ck_oaep_params *)mechanism.parameter;
            oaep.source = 1; /* CKZ_DATA_SPECIFIED */
            mechanism.parameter = &oaep;
        }
        a[1] = (word)&mechanism;
    }
    return call(id, a);
}

static CK_RV refusal(uint64_t set, enum function_id id, const word a[], forward call)
{
    if ((set & LOGIN_PER_SESSION) && needs_login(id) && !is_logged_in(a[0]))
        return CKR_USER_NOT_LOGGED_IN;
    FOR_MAKERS(maker, id) {
        CK_RV rv = refused_template(set, maker, a);
        if (rv != CKR_OK)
            return rv;
    }
    return has_mechanism(id) ? refused_mechanism(set, id, a, call) : CKR_OK;
}

CK_RV restricted_call(struct control *control, enum function_id id, unsigned arity,
                      const word given[], forward call)
{
    uint64_t set = atomic_load(&control->restrictions);
    if (!set)
        return call(id, given);
    CK_RV rv = refusal(set, id, given, call);
    if (rv != CKR_OK)
        return rv;

    if (id == FN_C_Login && (set & (PIN_PAD | LOGIN_PER_SESSION)))
        return log_in(control, set, given, call);
    if (id == FN_C_Logout && (set & LOGIN_PER_SESSION))
        return log_out(given, call);
    if (id == FN_C_OpenSession && (set & ONE_SESSION))
        return open_session(given, call);
    if (id == FN_C_GetAttributeValue)
        return get_attributes(set, given, call);

    word a[ARITY_MAX];
    memcpy(a, given, arity * sizeof *a);
    rv = call_changed(set, id, a, call);
    if (id == FN_C_CloseSession)
        set_login(given[0], false);
    if (id == FN_C_CloseAllSessions || id == FN_C_Finalize)
        forget_logins();
    if (rv != CKR_OK)
        return rv;
    if (id == FN_C_GetTokenInfo && given[1]) {
        struct ck_token_info *info = (struct ck_token_info *)given[1];
        if (set & BLANK_LABEL)
            memset(info->label, ' ', sizeof info->label);
        if (set & PIN_PAD)
            info->flags |= CKF_PROTECTED_AUTHENTICATION_PATH;
    }
    if ((set & LOGIN_PER_SESSION) && !is_logged_in(given[0])) {
        if (id == FN_C_GetSessionInfo) {
            struct ck_session_info *info = (struct ck_session_info *)given[1];
            info->state = info->state <= 1 ? 0 : 2; /* CKS_R?_PUBLIC_SESSION */
        }
        if (id == FN_C_FindObjects)
            hide_private_objects(given, call);
    }
    return rv;
}
