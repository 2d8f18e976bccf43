/* SM4 as a vendor has it: a key type, a key generation, ECB, CBC, CTR and GCM of C_Encrypt and
 * C_Decrypt in one part, and key wrap with padding (RFC 5649 with SM4 in the place of AES).
 *
 * SoftHSM keeps the keys, as secrets of types that nothing else here uses. This file computes with
 * their values, so SoftHSM lets them be read; whether the holder of the PIN may read or wrap them
 * is in the type, which SoftHSM compares with a CKA_UNWRAP_TEMPLATE as it does any attribute. It
 * honours all other attributes. CKA_SENSITIVE and CKA_EXTRACTABLE of an SM4 key do not change. A
 * CKA_WRAP_TEMPLATE or CKA_UNWRAP_TEMPLATE that names no type is for SM4 keys as well, so SoftHSM does
 * not see what it says of CKA_SENSITIVE.
 *
 * An SM4 key that is made to wrap or unwrap is an AES key there, with a mark behind its
 * CKA_ALLOWED_MECHANISMS in the place of the type: SoftHSM wraps, and so honours what is said of
 * wrapping. What it wrapped is ciphered again with SM4.
 */
#include "vendor.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "attributes.h"
#include "libcrypto.h"
#include "makers.h"

enum { BLOCK = 16, KEY = 16, NONCE = 12, TAG = 16 };
enum { ATTRIBUTES_MAX = 64, OPERATIONS_MAX = 1024, MECHANISMS = 6 };
enum { SEMIBLOCK = 8, ROUNDS = 6, WRAPPED_MAX = 4096, MECHANISMS_MAX = 32 };
enum { CKA_WRAP = 0x106 };
enum { CKA_ENCRYPT = 0x104, CKA_ALWAYS_SENSITIVE = 0x165, CKA_NEVER_EXTRACTABLE = 0x164 };
enum { CKA_LOCAL = 0x163, CKA_KEY_GEN_MECHANISM = 0x166, CKA_WRAP_TEMPLATE = 0x40000211 };
enum { CKF_ENCRYPT = 0x100, CKF_DECRYPT = 0x200, CKF_GENERATE = 0x8000 };
enum { CKF_WRAP = 0x20000, CKF_UNWRAP = 0x40000 };
enum {
    CKR_ATTRIBUTE_SENSITIVE = 0x11,
    CKR_DATA_LEN_RANGE = 0x21,
    CKR_ENCRYPTED_DATA_LEN_RANGE = 0x41,
    CKR_KEY_INDIGESTIBLE = 0x67,
    CKR_KEY_UNEXTRACTABLE = 0x6A,
};

static const unsigned char no = 0, yes = 1;
static const CK_ULONG secret_key = CKO_SECRET_KEY, aes = CKK_AES;

/* What an SM4 key is in SoftHSM. */
static const struct kind {
    CK_ULONG type;
    bool sensitive, extractable, generated;
} kinds[] = {
    {0x27, true, false, false}, /* CKK_MD5_HMAC */
    {0x28, true, true, false},  /* CKK_SHA_1_HMAC */
    {0x2E, false, false, false}, /* CKK_SHA224_HMAC */
    {0x2C, false, true, false}, /* CKK_SHA384_HMAC */
    {0x2D, true, false, true},  /* CKK_SHA512_HMAC */
};
enum { KINDS = sizeof kinds / sizeof *kinds };

/* Of a key that wraps: the kind, and whether its own template allows some mechanisms only. More than
 * any number of a mechanism, as SoftHSM sorts them. */
static const CK_ULONG mark = 0xFFFFFFFFFFFF0000;

static CK_ULONG mark_of(const struct kind *kind, bool allows_some)
{
    return mark + 2 * (CK_ULONG)(kind - kinds) + allows_some;
}

struct ck_gcm_params {
    const unsigned char *iv;
    CK_ULONG iv_length, iv_bits;
    const unsigned char *data;
    CK_ULONG data_length, tag_bits;
};

struct ck_ctr_params {
    CK_ULONG bits;
    unsigned char block[BLOCK];
};

/* --- the modes ----------------------------------------------------------------------------- */

static bool run(const void *cipher, const unsigned char key[KEY], const unsigned char *iv,
                bool encrypt, const unsigned char *in, size_t length, unsigned char *to)
{
    const struct libcrypto *lib = libcrypto();
    void *context = lib->EVP_CIPHER_CTX_new();
    int written = 0;
    bool done = context
        && lib->EVP_CipherInit_ex(context, cipher, NULL, key, iv, encrypt) == 1
        && lib->EVP_CIPHER_CTX_set_padding(context, 0) == 1
        && (!length || lib->EVP_CipherUpdate(context, to, &written, in, (int)length) == 1)
        && (size_t)written == length;
    lib->EVP_CIPHER_CTX_free(context);
    lib->ERR_clear_error();
    return done;
}

/* x := x · h in GF(2^128) (NIST SP 800-38D, 6.3). */
static void multiply(unsigned char x[BLOCK], const unsigned char h[BLOCK])
{
    unsigned char z[BLOCK] = {0}, v[BLOCK];
    memcpy(v, h, BLOCK);
    for (int i = 0; i < 8 * BLOCK; i++) {
        if (x[i / 8] >> (7 - i % 8) & 1)
            for (int b = 0; b < BLOCK; b++)
                z[b] ^= v[b];
        bool carry = v[BLOCK - 1] & 1;
        for (int b = BLOCK - 1; b > 0; b--)
            v[b] = (unsigned char)(v[b] >> 1 | v[b - 1] << 7);
        v[0] >>= 1;
        if (carry)
            v[0] ^= 0xE1;
    }
    memcpy(x, z, BLOCK);
}

static void hash(unsigned char x[BLOCK], const unsigned char h[BLOCK], const unsigned char *data,
                 size_t length)
{
    for (size_t i = 0; i < length; i++) {
        x[i % BLOCK] ^= data[i];
        if (i % BLOCK == BLOCK - 1 || i == length - 1)
            multiply(x, h);
    }
}

/* The tag of a ciphertext (7.1), with a nonce of 12 bytes. */
static bool tag_of(const unsigned char key[KEY], const unsigned char nonce[NONCE],
                   const unsigned char *data, size_t data_length, const unsigned char *in,
                   size_t length, unsigned char tag[TAG])
{
    const struct libcrypto *lib = libcrypto();
    unsigned char h[BLOCK] = {0}, first[BLOCK] = {[BLOCK - 1] = 1}, lengths[BLOCK];
    memcpy(first, nonce, NONCE);
    for (int b = 0; b < 8; b++) {
        lengths[b] = (unsigned char)((uint64_t)data_length * 8 >> (56 - 8 * b));
        lengths[8 + b] = (unsigned char)((uint64_t)length * 8 >> (56 - 8 * b));
    }
    bool done = run(lib->EVP_sm4_ecb(), key, NULL, true, h, BLOCK, h)
        && run(lib->EVP_sm4_ecb(), key, NULL, true, first, BLOCK, first);
    memset(tag, 0, TAG);
    hash(tag, h, data, data_length);
    hash(tag, h, in, length);
    hash(tag, h, lengths, BLOCK);
    for (int b = 0; b < TAG; b++)
        tag[b] ^= first[b];
    lib->OPENSSL_cleanse(h, sizeof h);
    return done;
}

/* The wrapping function without its first step (NIST SP 800-38F, 6.1): n semiblocks and the
 * integrity check value before them, which the caller has made or will look at. */
static bool cipher_wrapped(const void *cipher, const unsigned char key[KEY], bool encrypt,
                           unsigned char *data, size_t length)
{
    unsigned char block[BLOCK];
    if (length % SEMIBLOCK || length < BLOCK)
        return false;
    size_t n = length / SEMIBLOCK - 1;
    if (n == 1) /* RFC 5649, 4.1 */
        return run(cipher, key, NULL, encrypt, data, BLOCK, data);
    for (size_t done = 0; done < ROUNDS * n; done++) {
        size_t step = encrypt ? done + 1 : ROUNDS * n - done;
        unsigned char *half = data + SEMIBLOCK * ((step - 1) % n + 1);
        unsigned char counter[SEMIBLOCK] = {[6] = (unsigned char)(step >> 8),
                                            [7] = (unsigned char)step};
        memcpy(block, data, SEMIBLOCK);
        memcpy(block + SEMIBLOCK, half, SEMIBLOCK);
        for (int b = 0; b < SEMIBLOCK && !encrypt; b++)
            block[b] ^= counter[b];
        if (!run(cipher, key, NULL, encrypt, block, BLOCK, block))
            return false;
        for (int b = 0; b < SEMIBLOCK && encrypt; b++)
            block[b] ^= counter[b];
        memcpy(data, block, SEMIBLOCK);
        memcpy(half, block + SEMIBLOCK, SEMIBLOCK);
    }
    return true;
}

/* --- operations ---------------------------------------------------------------------------- */

enum mode { ECB, CBC, CTR, GCM };

static struct operation {
    CK_ULONG session, key;
    bool encrypt;
    enum mode mode;
    unsigned char iv[BLOCK], *data;
    size_t data_length;
} active[OPERATIONS_MAX];
static size_t actives;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static bool mode_of(const struct vendor *vendor, CK_ULONG mechanism, enum mode *mode)
{
    const CK_ULONG of[] = {vendor->sm4_ecb, vendor->sm4_cbc, vendor->sm4_ctr, vendor->sm4_gcm};
    for (*mode = ECB; *mode <= GCM; (*mode)++)
        if (of[*mode] && of[*mode] == mechanism)
            return true;
    return false;
}

/* Ends the session's operation in this direction, and says what it was. */
static bool end(CK_ULONG session, bool encrypt, struct operation *was)
{
    bool found = false;
    pthread_mutex_lock(&lock);
    for (size_t i = actives; i-- > 0 && !found;)
        if (active[i].session == session && active[i].encrypt == encrypt) {
            *was = active[i];
            active[i] = active[--actives];
            found = true;
        }
    pthread_mutex_unlock(&lock);
    return found;
}

static void begin(const struct operation *operation)
{
    pthread_mutex_lock(&lock);
    if (actives < OPERATIONS_MAX)
        active[actives++] = *operation;
    pthread_mutex_unlock(&lock);
}

static void forget(CK_ULONG session)
{
    struct operation was;
    for (int encrypt = 0; encrypt <= 1; encrypt++)
        if (end(session, encrypt, &was))
            free(was.data);
}

void sm4_after_fork_in_child(void)
{
    pthread_mutex_init(&lock, NULL);
    actives = 0;
}

/* --- objects ------------------------------------------------------------------------------- */

/* Length of the attribute, 0 where there is none or it is longer than ``size``. */
static CK_ULONG get(forward call, CK_ULONG session, CK_ULONG object, CK_ULONG type, void *to,
                    CK_ULONG size)
{
    struct ck_attribute read = {type, to, size};
    CK_RV rv = call(FN_C_GetAttributeValue, (const word[]){session, object, (word)&read, 1});
    return rv == CKR_OK ? read.length : 0;
}

static const struct kind *kind_by_type(CK_ULONG type)
{
    for (int i = 0; i < KINDS; i++)
        if (kinds[i].type == type)
            return &kinds[i];
    return NULL;
}

/* How many mechanisms a key that wraps allows, behind which its mark is; 0 for any other. */
static CK_ULONG allowed_by(forward call, CK_ULONG session, CK_ULONG object,
                           CK_ULONG list[MECHANISMS_MAX])
{
    CK_ULONG size = MECHANISMS_MAX * sizeof *list;
    CK_ULONG count = get(call, session, object, CKA_ALLOWED_MECHANISMS, list, size) / sizeof *list;
    return count && list[count - 1] >= mark ? count - 1 : 0;
}

/* NULL where the object is not an SM4 key. */
static const struct kind *kind_of(forward call, CK_ULONG session, CK_ULONG object)
{
    CK_ULONG type, list[MECHANISMS_MAX], allowed;
    if (get(call, session, object, CKA_KEY_TYPE, &type, sizeof type) != sizeof type)
        return NULL;
    if (type != CKK_AES)
        return kind_by_type(type);
    allowed = allowed_by(call, session, object, list);
    return allowed ? &kinds[(list[allowed] - mark) / 2] : NULL;
}

static CK_RV begin_operation(const struct vendor *vendor, enum function_id id, const word a[],
                             forward call)
{
    const struct ck_mechanism *mechanism = (const struct ck_mechanism *)a[1];
    struct operation made = {.session = a[0], .key = a[2], .encrypt = id == FN_C_EncryptInit}, was;
    if (!mechanism || !mode_of(vendor, mechanism->mechanism, &made.mode))
        return kind_of(call, a[0], a[2]) ? CKR_KEY_TYPE_INCONSISTENT : call(id, a);
    if (!kind_of(call, a[0], a[2]))
        return CKR_KEY_TYPE_INCONSISTENT;
    unsigned char may = 0;
    get(call, a[0], a[2], made.encrypt ? CKA_ENCRYPT : CKA_DECRYPT, &may, sizeof may);
    if (!may)
        return CKR_KEY_FUNCTION_NOT_PERMITTED;
    const CK_ULONG lengths[] = {0, BLOCK, sizeof(struct ck_ctr_params), sizeof(struct ck_gcm_params)};
    if (mechanism->length != lengths[made.mode] || (made.mode != ECB && !mechanism->parameter))
        return CKR_MECHANISM_PARAM_INVALID;
    if (made.mode == CBC)
        memcpy(made.iv, mechanism->parameter, BLOCK);
    if (made.mode == CTR)
        memcpy(made.iv, ((const struct ck_ctr_params *)mechanism->parameter)->block, BLOCK);
    if (made.mode == GCM) {
        const struct ck_gcm_params *given = mechanism->parameter;
        if (given->iv_length != NONCE || !given->iv || given->tag_bits != 8 * TAG
            || (given->data_length && !given->data))
            return CKR_MECHANISM_PARAM_INVALID;
        memcpy(made.iv, given->iv, NONCE);
        made.iv[BLOCK - 1] = 2; /* the counter of the first block that is not the tag's */
        made.data_length = given->data_length;
        made.data = malloc(given->data_length + 1);
        if (!made.data)
            return CKR_FUNCTION_FAILED;
        memcpy(made.data, given->data ? given->data : &no, given->data_length);
    }
    if (end(a[0], made.encrypt, &was)) {
        free(was.data);
        free(made.data);
        return CKR_OPERATION_ACTIVE;
    }
    begin(&made);
    return CKR_OK;
}

static CK_RV perform(const struct operation *op, forward call, const unsigned char *in,
                     size_t length, unsigned char *to)
{
    const struct libcrypto *lib = libcrypto();
    const void *const ciphers[] = {lib->EVP_sm4_ecb(), lib->EVP_sm4_cbc(), lib->EVP_sm4_ctr(),
                                   lib->EVP_sm4_ctr()};
    unsigned char key[KEY], tag[TAG];
    size_t body = op->mode == GCM && !op->encrypt ? length - TAG : length;
    if (get(call, op->session, op->key, CKA_VALUE, key, sizeof key) != sizeof key)
        return CKR_FUNCTION_FAILED;
    bool done = true, right = true;
    if (op->mode == GCM && !op->encrypt) {
        done = tag_of(key, op->iv, op->data, op->data_length, in, body, tag);
        right = memcmp(tag, in + body, TAG) == 0;
    }
    done = done && (!right || run(ciphers[op->mode], key, op->iv, op->encrypt, in, body, to));
    if (op->mode == GCM && op->encrypt)
        done = done && tag_of(key, op->iv, op->data, op->data_length, to, body, to + body);
    lib->OPENSSL_cleanse(key, sizeof key);
    return !done ? CKR_FUNCTION_FAILED : right ? CKR_OK : CKR_ENCRYPTED_DATA_INVALID;
}

static CK_RV once(enum function_id id, const word a[], forward call)
{
    CK_ULONG *room = (CK_ULONG *)a[4];
    size_t length = a[2], needed;
    struct operation op;
    if (!end(a[0], id == FN_C_Encrypt, &op))
        return call(id, a);
    CK_RV rv = CKR_OK;
    if (!room || (length && !a[1]))
        rv = CKR_ARGUMENTS_BAD;
    else if ((op.mode == ECB || op.mode == CBC) && length % BLOCK)
        rv = op.encrypt ? CKR_DATA_LEN_RANGE : CKR_ENCRYPTED_DATA_LEN_RANGE;
    else if (op.mode == GCM && !op.encrypt && length < TAG)
        rv = CKR_ENCRYPTED_DATA_LEN_RANGE;
    if (rv == CKR_OK) {
        needed = op.mode != GCM ? length : op.encrypt ? length + TAG : length - TAG;
        bool fits = *room >= needed;
        *room = needed;
        if (!a[3] || !fits) {
            begin(&op);
            return a[3] ? CKR_BUFFER_TOO_SMALL : CKR_OK;
        }
        rv = perform(&op, call, (const unsigned char *)a[1], length, (unsigned char *)a[3]);
    }
    free(op.data);
    return rv;
}

/* --- templates ----------------------------------------------------------------------------- */

struct template {
    struct ck_attribute attribute[ATTRIBUTES_MAX];
    CK_ULONG count;
    CK_ULONG mechanisms[MECHANISMS_MAX];
};

static void append(struct template *to, CK_ULONG type, const void *value, CK_ULONG length)
{
    if (to->count < ATTRIBUTES_MAX)
        to->attribute[to->count++] = (struct ck_attribute){type, value, length};
}

static bool is_own(const struct vendor *vendor, const struct ck_attribute *list, CK_ULONG count)
{
    return is_number(find(list, count, CKA_KEY_TYPE), vendor->sm4_key_type);
}

static const struct kind *kind_asked(const struct ck_attribute *list, CK_ULONG count, bool made)
{
    bool sensitive = !says(list, count, CKA_SENSITIVE, false);
    bool extractable = says(list, count, CKA_EXTRACTABLE, true);
    for (int i = KINDS; i-- > 0;)
        if (kinds[i].sensitive == sensitive && kinds[i].extractable == extractable
            && (made || !kinds[i].generated))
            return &kinds[i];
    return NULL; /* does not happen */
}

static void exchange(CK_ULONG *list, CK_ULONG count, CK_ULONG from, CK_ULONG to)
{
    for (CK_ULONG i = 0; i < count; i++)
        if (list[i] == from)
            list[i] = to;
}

/* What a key that wraps may do, and its mark. */
static void append_allowed(const struct vendor *vendor, const struct kind *kind,
                           const struct ck_attribute *given, struct template *to)
{
    CK_ULONG count = given ? given->length / sizeof *to->mechanisms : 1;
    if (count >= MECHANISMS_MAX)
        return;
    if (given)
        memcpy(to->mechanisms, given->value, given->length);
    else
        *to->mechanisms = vendor->sm4_wrap;
    exchange(to->mechanisms, count, vendor->sm4_wrap, CKM_AES_KEY_WRAP_PAD);
    to->mechanisms[count] = mark_of(kind, given != NULL);
    append(to, CKA_ALLOWED_MECHANISMS, to->mechanisms, (count + 1) * sizeof *to->mechanisms);
}

/* A template as SoftHSM gets it; ``nested`` is room for SM4 keys' in it, ``kind`` what it is itself
 * if it is an SM4 key's. What is added comes first: SoftHSM takes nothing after CKA_MODIFIABLE. */
static void rewrite(const struct vendor *vendor, const struct ck_attribute *from, CK_ULONG count,
                    const struct kind *kind, struct template *to, struct template *nested)
{
    bool wraps = kind
        && (says(from, count, CKA_WRAP, true) || says(from, count, CKA_UNWRAP, true));
    if (kind) {
        append(to, CKA_KEY_TYPE, wraps ? &aes : &kind->type, sizeof kind->type);
        if (wraps)
            append_allowed(vendor, kind, find(from, count, CKA_ALLOWED_MECHANISMS), to);
        append(to, CKA_SENSITIVE, &no, sizeof no);
        append(to, CKA_EXTRACTABLE, &yes, sizeof yes);
    }
    for (CK_ULONG i = 0; from && i < count; i++) {
        CK_ULONG type = from[i].type, inside = from[i].length / sizeof *from;
        const struct ck_attribute *inner = from[i].value;
        bool unwrap = type == CKA_UNWRAP_TEMPLATE;
        if (kind && (type == CKA_KEY_TYPE || type == CKA_SENSITIVE || type == CKA_EXTRACTABLE
                     || type == CKA_VALUE_LEN || (wraps && type == CKA_ALLOWED_MECHANISMS)))
            continue;
        append(to, type, from[i].value, from[i].length);
        struct ck_attribute *last = &to->attribute[to->count - 1];
        if (!nested || (!unwrap && type != CKA_WRAP_TEMPLATE))
            continue;
        bool own = is_own(vendor, inner, inside);
        if (own || !find(inner, inside, CKA_KEY_TYPE)) {
            struct template *room = &nested[unwrap];
            room->count = 0;
            if (own)
                rewrite(vendor, inner, inside, kind_asked(inner, inside, false), room, NULL);
            for (CK_ULONG n = 0; !own && n < inside; n++)
                if (inner[n].type != CKA_SENSITIVE)
                    append(room, inner[n].type, inner[n].value, inner[n].length);
            last->value = room->attribute;
            last->length = room->count * sizeof *inner;
        }
    }
}

static bool names_a_kind(const struct ck_attribute *list, CK_ULONG count)
{
    const struct ck_attribute *type = find(list, count, CKA_KEY_TYPE);
    const struct ck_attribute *allowed = find(list, count, CKA_ALLOWED_MECHANISMS);
    for (CK_ULONG i = 0; allowed && i < allowed->length / sizeof(CK_ULONG); i++)
        if (((const CK_ULONG *)allowed->value)[i] >= mark)
            return true;
    return type && type->length == sizeof(CK_ULONG)
        && kind_by_type(*(const CK_ULONG *)type->value) != NULL;
}

static CK_RV with_right_length(CK_RV rv, CK_ULONG session, const CK_ULONG *made, CK_RV wrong,
                               forward call)
{
    unsigned char value[2 * KEY];
    if (rv != CKR_OK)
        return rv;
    CK_ULONG length = get(call, session, *made, CKA_VALUE, value, sizeof value);
    libcrypto()->OPENSSL_cleanse(value, sizeof value);
    if (length == KEY)
        return CKR_OK;
    call(FN_C_DestroyObject, (const word[]){session, *made});
    return wrong;
}

static CK_RV make(const struct vendor *vendor, enum function_id id, const word given[], forward call)
{
    word a[ARGUMENTS_MAX];
    struct template to[2] = {{.count = 0}, {.count = 0}}, nested[2];
    size_t used = 0;
    bool own = false;
    copy_arguments(id, given, a);
    FOR_MAKERS(maker, id) {
        const struct ck_attribute *list = (const struct ck_attribute *)a[maker->template];
        CK_ULONG count = a[maker->count];
        if (names_a_kind(list, count))
            return CKR_ATTRIBUTE_VALUE_INVALID;
        const struct kind *kind = is_own(vendor, list, count) ? kind_asked(list, count, false) : NULL;
        own |= kind != NULL;
        rewrite(vendor, list, count, kind, &to[used], nested);
        if (list)
            a[maker->template] = (word)to[used].attribute;
        a[maker->count] = to[used++].count;
    }
    if (!own)
        return call(id, a);
    if (id == FN_C_CreateObject)
        return with_right_length(call(id, a), a[0], (CK_ULONG *)a[3], CKR_ATTRIBUTE_VALUE_INVALID,
                                 call);
    if (id == FN_C_UnwrapKey && a[7])
        return with_right_length(call(id, a), a[0], (CK_ULONG *)a[7], CKR_WRAPPED_KEY_LEN_RANGE,
                                 call);
    return CKR_TEMPLATE_INCONSISTENT;
}

static CK_RV generate(const struct vendor *vendor, const word a[], forward call)
{
    const struct ck_attribute *list = (const struct ck_attribute *)a[2];
    unsigned char value[KEY];
    struct template to = {.count = 0}, nested[2];
    if (!is_own(vendor, list, a[3]) || find(list, a[3], CKA_VALUE) || names_a_kind(list, a[3]))
        return CKR_TEMPLATE_INCONSISTENT;
    CK_RV rv = call(FN_C_GenerateRandom, (const word[]){a[0], (word)value, sizeof value});
    if (rv != CKR_OK)
        return rv;
    if (!find(list, a[3], CKA_CLASS))
        append(&to, CKA_CLASS, &secret_key, sizeof secret_key);
    append(&to, CKA_VALUE, value, sizeof value);
    rewrite(vendor, list, a[3], kind_asked(list, a[3], true), &to, nested);
    rv = call(FN_C_CreateObject, (const word[]){a[0], (word)to.attribute, to.count, a[4]});
    libcrypto()->OPENSSL_cleanse(value, sizeof value);
    return rv;
}

/* --- one call ------------------------------------------------------------------------------ */

/* What a key that wraps allows, in the place of what SoftHSM has read. */
static CK_RV give_allowed(const struct vendor *vendor, CK_ULONG *list, CK_ULONG count,
                          struct ck_attribute *to, CK_ULONG room)
{
    if ((list[count] - mark) % 2 == 0)
        count = 0;
    exchange(list, count, CKM_AES_KEY_WRAP_PAD, vendor->sm4_wrap);
    bool fits = !to->value || room >= count * sizeof *list;
    if (to->value && fits)
        memcpy((void *)to->value, list, count * sizeof *list);
    to->length = fits ? count * sizeof *list : (CK_ULONG)-1;
    return fits ? CKR_OK : CKR_BUFFER_TOO_SMALL;
}

static CK_RV get_attributes(const struct vendor *vendor, const word a[], forward call)
{
    struct ck_attribute *read = (struct ck_attribute *)a[2];
    const struct kind *kind = kind_of(call, a[0], a[1]);
    CK_ULONG list[MECHANISMS_MAX], room = 0;
    CK_ULONG allowed = kind ? allowed_by(call, a[0], a[1], list) : 0;
    struct ck_attribute *of_allowed = NULL;
    for (CK_ULONG i = 0; allowed && read && i < a[3]; i++)
        if (read[i].type == CKA_ALLOWED_MECHANISMS) {
            of_allowed = &read[i];
            room = read[i].length;
            of_allowed->type = CKA_CLASS; /* which every object has */
        }
    const void *place = of_allowed ? of_allowed->value : NULL;
    if (of_allowed)
        of_allowed->value = NULL;
    CK_RV rv = call(FN_C_GetAttributeValue, a);
    if (of_allowed) {
        of_allowed->type = CKA_ALLOWED_MECHANISMS;
        of_allowed->value = place;
        CK_RV given = give_allowed(vendor, list, allowed, of_allowed, room);
        rv = rv == CKR_OK ? given : rv;
    }
    for (CK_ULONG i = 0; kind && read && i < a[3]; i++) {
        void *value = (void *)read[i].value;
        if (read[i].type == CKA_VALUE && (kind->sensitive || !kind->extractable)) {
            if (value && read[i].length != (CK_ULONG)-1)
                libcrypto()->OPENSSL_cleanse(value, read[i].length);
            read[i].length = (CK_ULONG)-1;
            rv = CKR_ATTRIBUTE_SENSITIVE;
        }
        if (!value || read[i].length == (CK_ULONG)-1)
            continue;
        switch (read[i].type) {
        case CKA_KEY_TYPE: *(CK_ULONG *)value = vendor->sm4_key_type; break;
        case CKA_SENSITIVE: *(unsigned char *)value = kind->sensitive; break;
        case CKA_EXTRACTABLE: *(unsigned char *)value = kind->extractable; break;
        case CKA_LOCAL:
        case CKA_ALWAYS_SENSITIVE:
        case CKA_NEVER_EXTRACTABLE: *(unsigned char *)value = kind->generated; break;
        case CKA_KEY_GEN_MECHANISM:
            if (kind->generated)
                *(CK_ULONG *)value = vendor->sm4_generate;
        }
    }
    return rv;
}

/* C_CopyObject and C_SetAttributeValue. */
static CK_RV change(const struct vendor *vendor, enum function_id id, const word a[], forward call)
{
    const struct ck_attribute *list = (const struct ck_attribute *)a[2];
    const struct kind *kind = kind_of(call, a[0], a[1]);
    struct template to = {.count = 0};
    if (names_a_kind(list, a[3]))
        return CKR_ATTRIBUTE_VALUE_INVALID;
    if (!kind)
        return id == FN_C_CopyObject ? make(vendor, id, a, call) : call(id, a);
    for (CK_ULONG i = 0; list && i < a[3]; i++) {
        bool sensitive = list[i].type == CKA_SENSITIVE;
        if (list[i].type == CKA_KEY_TYPE || list[i].type == CKA_VALUE
            || list[i].type == CKA_ALLOWED_MECHANISMS)
            return CKR_ATTRIBUTE_READ_ONLY;
        if (!sensitive && list[i].type != CKA_EXTRACTABLE)
            append(&to, list[i].type, list[i].value, list[i].length);
        else if (!says(list, a[3], list[i].type, sensitive ? kind->sensitive : kind->extractable))
            return CKR_ATTRIBUTE_READ_ONLY;
    }
    return call(id, (const word[]){a[0], a[1], (word)to.attribute, to.count, a[4]});
}

/* What is wrapped under the AES key that stands for an SM4 key, as wrapped under that, or back. */
static bool exchange_cipher(forward call, CK_ULONG session, CK_ULONG object, bool to_sm4,
                            unsigned char *data, size_t length)
{
    const struct libcrypto *lib = libcrypto();
    const void *const ciphers[] = {lib->EVP_aes_128_ecb(), lib->EVP_sm4_ecb()};
    unsigned char key[KEY];
    bool done = get(call, session, object, CKA_VALUE, key, sizeof key) == sizeof key
        && cipher_wrapped(ciphers[!to_sm4], key, false, data, length)
        && cipher_wrapped(ciphers[to_sm4], key, true, data, length);
    lib->OPENSSL_cleanse(key, sizeof key);
    return done;
}

static const struct ck_mechanism aes_key_wrap = {CKM_AES_KEY_WRAP_PAD, NULL, 0};

/* Whether an SM4 key may be used so: by the vendor's key wrap alone. */
static CK_RV refused_wrap(const struct vendor *vendor, const struct ck_mechanism *mechanism)
{
    if (!vendor->sm4_wrap || !mechanism || mechanism->mechanism != vendor->sm4_wrap)
        return CKR_KEY_TYPE_INCONSISTENT;
    return mechanism->length ? CKR_MECHANISM_PARAM_INVALID : CKR_OK;
}

static CK_RV wrap(const struct vendor *vendor, const word a[], forward call)
{
    const struct kind *kind = kind_of(call, a[0], a[3]);
    bool by_sm4 = kind_of(call, a[0], a[2]) != NULL;
    CK_RV rv = by_sm4 ? refused_wrap(vendor, (const struct ck_mechanism *)a[1]) : CKR_OK;
    if (rv == CKR_OK && kind && !kind->extractable)
        rv = CKR_KEY_UNEXTRACTABLE;
    if (rv != CKR_OK || !by_sm4)
        return rv == CKR_OK ? call(FN_C_WrapKey, a) : rv;
    rv = call(FN_C_WrapKey, (const word[]){a[0], (word)&aes_key_wrap, a[2], a[3], a[4], a[5]});
    bool done = rv != CKR_OK || !a[4]
        || exchange_cipher(call, a[0], a[2], true, (unsigned char *)a[4], *(CK_ULONG *)a[5]);
    return done ? rv : CKR_FUNCTION_FAILED;
}

static CK_RV unwrap(const struct vendor *vendor, word a[], forward call)
{
    unsigned char blob[WRAPPED_MAX];
    CK_RV rv = refused_wrap(vendor, (const struct ck_mechanism *)a[1]);
    if (rv != CKR_OK)
        return rv;
    if (!a[3] || a[4] > sizeof blob)
        return a[3] ? CKR_WRAPPED_KEY_LEN_RANGE : CKR_ARGUMENTS_BAD;
    memcpy(blob, (const void *)a[3], a[4]);
    if (!exchange_cipher(call, a[0], a[2], false, blob, a[4]))
        return CKR_WRAPPED_KEY_LEN_RANGE;
    a[1] = (word)&aes_key_wrap;
    a[3] = (word)blob;
    return make(vendor, FN_C_UnwrapKey, a, call);
}

/* A search by the type finds the keys that are as sensitive and extractable as it says. */
static CK_RV find_objects(const struct vendor *vendor, const word a[], forward call)
{
    const struct ck_attribute *list = (const struct ck_attribute *)a[1];
    struct template to = {.count = 0}, nested[2];
    if (!is_own(vendor, list, a[2]))
        return call(FN_C_FindObjectsInit, a);
    rewrite(vendor, list, a[2], kind_asked(list, a[2], false), &to, nested);
    return call(FN_C_FindObjectsInit, (const word[]){a[0], (word)to.attribute, to.count});
}

static CK_RV list_mechanisms(const struct vendor *vendor, const word a[], forward call)
{
    const CK_ULONG own[MECHANISMS] = {vendor->sm4_generate, vendor->sm4_ecb, vendor->sm4_cbc,
                                      vendor->sm4_ctr, vendor->sm4_gcm, vendor->sm4_wrap};
    CK_ULONG *list = (CK_ULONG *)a[1], *count = (CK_ULONG *)a[2], more = 0;
    for (int i = 0; i < MECHANISMS; i++)
        more += own[i] != 0;
    if (!count || (list && *count < more))
        return count ? CKR_BUFFER_TOO_SMALL : call(FN_C_GetMechanismList, a);
    if (list)
        *count -= more;
    CK_RV rv = call(FN_C_GetMechanismList, a);
    if (rv != CKR_OK && rv != CKR_BUFFER_TOO_SMALL)
        return rv;
    for (int i = 0; list && rv == CKR_OK && i < MECHANISMS; i++)
        if (own[i])
            list[(*count)++] = own[i];
    if (!list || rv != CKR_OK)
        *count += more;
    return rv;
}

static CK_RV mechanism_info(const struct vendor *vendor, const word a[], forward call)
{
    enum mode mode;
    CK_ULONG flags = mode_of(vendor, a[1], &mode)   ? CKF_ENCRYPT | CKF_DECRYPT
        : a[1] && a[1] == vendor->sm4_generate      ? CKF_GENERATE
        : a[1] && a[1] == vendor->sm4_wrap          ? CKF_WRAP | CKF_UNWRAP
                                                    : 0;
    if (!flags)
        return call(FN_C_GetMechanismInfo, a);
    if (!a[2])
        return CKR_ARGUMENTS_BAD;
    *(struct ck_mechanism_info *)a[2] = (struct ck_mechanism_info){KEY, KEY, flags};
    return CKR_OK;
}

CK_RV sm4_call(const struct vendor *vendor, enum function_id id, const word given[], forward call)
{
    word a[ARGUMENTS_MAX];
    copy_arguments(id, given, a);
    const struct ck_mechanism *mechanism = (const struct ck_mechanism *)a[1]; /* of some */
    switch (id) {
    case FN_C_GetMechanismList: return list_mechanisms(vendor, a, call);
    case FN_C_GetMechanismInfo: return mechanism_info(vendor, a, call);
    case FN_C_FindObjectsInit: return find_objects(vendor, a, call);
    case FN_C_GetAttributeValue: return get_attributes(vendor, a, call);
    case FN_C_CopyObject:
    case FN_C_SetAttributeValue: return change(vendor, id, a, call);
    case FN_C_GenerateKey:
        if (mechanism && mechanism->mechanism == vendor->sm4_generate)
            return generate(vendor, a, call);
        return make(vendor, id, a, call);
    case FN_C_CreateObject:
    case FN_C_GenerateKeyPair: return make(vendor, id, a, call);
    case FN_C_UnwrapKey:
        if (kind_of(call, a[0], a[2]))
            return unwrap(vendor, a, call);
        return make(vendor, id, a, call);
    case FN_C_DeriveKey:
        if (kind_of(call, a[0], a[2]))
            return CKR_KEY_TYPE_INCONSISTENT;
        return make(vendor, id, a, call);
    case FN_C_SignInit:
    case FN_C_VerifyInit: return kind_of(call, a[0], a[2]) ? CKR_KEY_TYPE_INCONSISTENT : call(id, a);
    case FN_C_DigestKey: return kind_of(call, a[0], a[1]) ? CKR_KEY_INDIGESTIBLE : call(id, a);
    case FN_C_WrapKey: return wrap(vendor, a, call);
    case FN_C_EncryptInit:
    case FN_C_DecryptInit: return begin_operation(vendor, id, a, call);
    case FN_C_Encrypt:
    case FN_C_Decrypt: return once(id, a, call);
    case FN_C_CloseSession: forget(a[0]); return call(id, a);
    case FN_C_CloseAllSessions:
    case FN_C_Finalize: sm4_after_fork_in_child(); return call(id, a);
    default: return call(id, a);
    }
}
