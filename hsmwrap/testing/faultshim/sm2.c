/* SM2 as a vendor has it: a key type, a key pair generation, C_Decrypt and C_UnwrapKey by a
 * mechanism of the vendor's. Plaintext is in this file only, and wiped.
 *
 * SoftHSM keeps what is kept, and so honours every attribute of a key. It unwraps no SM2 private
 * key by AES key wrap, but one of P-256 (field note 9). So the private key object of a generated
 * pair is a P-256 key; the SM2 scalar is the result of ECDH between it and a fixed point, which
 * is the same before it was wrapped and after it was unwrapped. An SM2 key that is made by
 * C_CreateObject is a key on the SM2 curve, for known answers, and cannot be unwrapped.
 *
 * CKA_SUBJECT of these objects starts with a mark. Behind it is what SoftHSM does not read out:
 * the CKA_UNWRAP_TEMPLATE of the key.
 */
#include "vendor.h"

#include <pthread.h>
#include <string.h>

#include "attributes.h"
#include "libcrypto.h"
#include "makers.h"

enum { FIELD = 32, POINT = 65, HASH = 32, LENGTH_MAX = 1024, SUBJECT_MAX = 2048 };
enum { ATTRIBUTES_MAX = 64, MECHANISMS_MAX = 32, SESSIONS_MAX = 1024 };
enum { CKF_DECRYPT = 0x200, CKF_GENERATE_KEY_PAIR = 0x10000, CKF_UNWRAP = 0x40000 };

static const unsigned char mark[] = "hsmwrap fault shim: SM2";
static const unsigned char sm2_oid[] = {6, 8, 0x2A, 0x81, 0x1C, 0xCF, 0x55, 0x01, 0x82, 0x2D};
static const unsigned char p256_oid[] = {6, 8, 0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x03, 0x01, 0x07};
/* Of the fixed point's logarithm to the base of P-256. */
static const unsigned char fixed[FIELD] = "hsmwrap: a simulated vendor SM2";
static const unsigned char one[FIELD] = {[FIELD - 1] = 1};
static const unsigned char no = 0, yes = 1;
static const CK_ULONG ec = CKK_EC, public_key = CKO_PUBLIC_KEY;

struct ck_ecdh1_params {
    CK_ULONG kdf, shared_length;
    const void *shared;
    CK_ULONG public_length;
    const void *public;
};

/* --- the curve ----------------------------------------------------------------------------- */

/* [scalar]P as an uncompressed point; of the generator without P. False for what is not a point. */
static bool multiply(int curve, const unsigned char scalar[FIELD], const unsigned char *from,
                     size_t length, unsigned char to[POINT])
{
    const struct libcrypto *lib = libcrypto();
    void *context = lib->BN_CTX_new(), *group = lib->EC_GROUP_new_by_curve_name(curve);
    void *number = lib->BN_bin2bn(scalar, FIELD, NULL);
    void *point = group ? lib->EC_POINT_new(group) : NULL;
    bool done = context && number && point
        && (!from || lib->EC_POINT_oct2point(group, point, from, length, context) == 1)
        && lib->EC_POINT_mul(group, point, from ? NULL : number, from ? point : NULL,
                             from ? number : NULL, context) == 1
        && lib->EC_POINT_point2oct(group, point, POINT_UNCOMPRESSED, to, POINT, context) == POINT;
    lib->EC_POINT_clear_free(point);
    lib->BN_clear_free(number);
    lib->BN_CTX_free(context);
    lib->EC_GROUP_free(group);
    lib->ERR_clear_error();
    return done;
}

static void sm3(const void *data, size_t length, unsigned char to[HASH])
{
    const struct libcrypto *lib = libcrypto();
    lib->EVP_Digest(data, length, to, NULL, lib->EVP_sm3(), NULL);
}

/* --- ciphertexts --------------------------------------------------------------------------- */

struct ciphertext {
    unsigned char c1[POINT];
    const unsigned char *c3, *c2;
    size_t length;
};

static bool tlv(const unsigned char **at, const unsigned char *end, unsigned char tag,
                const unsigned char **value, size_t *length)
{
    const unsigned char *p = *at;
    if (end - p < 2 || p[0] != tag)
        return false;
    size_t head = 2, told = p[1];
    if (told == 0x81 && end - p > 2)
        head = 3, told = p[2];
    else if (told >= 0x80)
        return false;
    if ((size_t)(end - p) < head + told)
        return false;
    *value = p + head;
    *length = told;
    *at = p + head + told;
    return true;
}

static bool parse_der(const unsigned char *in, size_t size, struct ciphertext *to)
{
    const unsigned char *at = in, *value, *end = in + size;
    size_t length;
    if (!tlv(&at, end, 0x30, &value, &length) || at != end)
        return false;
    at = value;
    memset(to->c1, 0, sizeof to->c1);
    to->c1[0] = POINT_UNCOMPRESSED;
    for (int i = 1; i <= 2; i++) {
        if (!tlv(&at, end, 0x02, &value, &length))
            return false;
        for (; length > 0 && *value == 0; length--)
            value++;
        if (length > FIELD)
            return false;
        memcpy(to->c1 + 1 + i * FIELD - length, value, length);
    }
    return tlv(&at, end, 0x04, &to->c3, &length) && length == HASH
        && tlv(&at, end, 0x04, &to->c2, &to->length) && to->length && at == end;
}

static bool parse(enum sm2_layout layout, const unsigned char *in, size_t size,
                  struct ciphertext *to)
{
    if (layout == SM2_DER)
        return size <= LENGTH_MAX && parse_der(in, size, to);
    if (size <= POINT + HASH || size > LENGTH_MAX)
        return false;
    memcpy(to->c1, in, POINT);
    to->length = size - POINT - HASH;
    to->c3 = in + POINT + (layout == SM2_C1C2C3 ? to->length : 0);
    to->c2 = in + POINT + (layout == SM2_C1C2C3 ? 0 : HASH);
    return in[0] == POINT_UNCOMPRESSED;
}

/* GB/T 32918.4, 7.1, B4 to B6, for one shared point. */
static bool unmask(const struct ciphertext *from, const unsigned char shared[POINT],
                   unsigned char to[LENGTH_MAX])
{
    unsigned char input[2 * FIELD + 4], block[HASH], whole[2 * FIELD + LENGTH_MAX], zeros = 0;
    memcpy(input, shared + 1, 2 * FIELD);
    for (size_t i = 0; i < from->length; i++) {
        size_t counter = i / HASH + 1;
        if (i % HASH == 0) {
            for (int b = 0; b < 4; b++)
                input[2 * FIELD + b] = (unsigned char)(counter >> (24 - 8 * b));
            sm3(input, sizeof input, block);
        }
        zeros |= block[i % HASH];
        to[i] = from->c2[i] ^ block[i % HASH];
    }
    memcpy(whole, shared + 1, FIELD);
    memcpy(whole + FIELD, to, from->length);
    memcpy(whole + FIELD + from->length, shared + 1 + FIELD, FIELD);
    sm3(whole, 2 * FIELD + from->length, block);
    const struct libcrypto *lib = libcrypto();
    lib->OPENSSL_cleanse(whole, sizeof whole);
    lib->OPENSSL_cleanse(input, sizeof input);
    return zeros && memcmp(block, from->c3, HASH) == 0;
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

static bool get_flag(forward call, CK_ULONG session, CK_ULONG object, CK_ULONG type)
{
    unsigned char value = 0;
    return get(call, session, object, type, &value, sizeof value) == 1 && value;
}

/* Length of CKA_SUBJECT if the object is one of this file's; 0 otherwise. */
static CK_ULONG subject_of(forward call, CK_ULONG session, CK_ULONG object,
                           unsigned char subject[SUBJECT_MAX])
{
    CK_ULONG length = get(call, session, object, CKA_SUBJECT, subject, SUBJECT_MAX);
    return length >= sizeof mark && memcmp(subject, mark, sizeof mark) == 0 ? length : 0;
}

static bool is_sm2(forward call, CK_ULONG session, CK_ULONG object)
{
    unsigned char subject[SUBJECT_MAX];
    return subject_of(call, session, object, subject) != 0;
}

static CK_RV ecdh(forward call, CK_ULONG session, CK_ULONG key, const unsigned char point[POINT],
                  unsigned char x[FIELD])
{
    const CK_ULONG class = CKO_SECRET_KEY, type = CKK_GENERIC_SECRET, length = FIELD;
    const struct ck_attribute template[] = {
        {CKA_CLASS, &class, sizeof class},   {CKA_KEY_TYPE, &type, sizeof type},
        {CKA_TOKEN, &no, sizeof no},         {CKA_SENSITIVE, &no, sizeof no},
        {CKA_EXTRACTABLE, &yes, sizeof yes}, {CKA_VALUE_LEN, &length, sizeof length},
    };
    const struct ck_ecdh1_params params = {1, 0, NULL, POINT, point}; /* CKD_NULL */
    const struct ck_mechanism mechanism = {CKM_ECDH1_DERIVE, &params, sizeof params};
    CK_ULONG derived = 0;
    CK_RV rv = call(FN_C_DeriveKey,
                    (const word[]){session, (word)&mechanism, key, (word)template,
                                   sizeof template / sizeof *template, (word)&derived});
    if (rv != CKR_OK)
        return rv;
    CK_ULONG got = get(call, session, derived, CKA_VALUE, x, FIELD);
    call(FN_C_DestroyObject, (const word[]){session, derived});
    return got == FIELD ? CKR_OK : CKR_FUNCTION_FAILED;
}

/* From the x coordinate of ECDH between the object's P-256 key and the fixed point. */
static void scalar_from(unsigned char x[FIELD])
{
    x[0] &= 0x7F; /* below the order of the SM2 curve */
}

/* x([d]C1); C1 has to be on the curve. */
static CK_RV shared_x(forward call, CK_ULONG session, CK_ULONG key, const unsigned char c1[POINT],
                      CK_RV invalid, unsigned char x[FIELD])
{
    unsigned char params[sizeof p256_oid], scalar[FIELD], point[POINT];
    if (!multiply(NID_SM2, one, c1, POINT, point))
        return invalid;
    if (get(call, session, key, CKA_EC_PARAMS, params, sizeof params) != sizeof params)
        return CKR_FUNCTION_FAILED;
    if (memcmp(params, p256_oid, sizeof params) != 0)
        return ecdh(call, session, key, c1, x);
    if (!multiply(NID_P256, fixed, NULL, 0, point))
        return CKR_FUNCTION_FAILED;
    CK_RV rv = ecdh(call, session, key, point, scalar);
    if (rv != CKR_OK)
        return rv;
    scalar_from(scalar);
    bool done = multiply(NID_SM2, scalar, c1, POINT, point);
    memcpy(x, point + 1, FIELD);
    libcrypto()->OPENSSL_cleanse(scalar, sizeof scalar);
    return done ? CKR_OK : CKR_FUNCTION_FAILED;
}

static CK_RV decrypt(forward call, CK_ULONG session, CK_ULONG key, enum sm2_layout layout,
                     const void *in, size_t size, CK_RV invalid, unsigned char to[LENGTH_MAX],
                     size_t *length)
{
    struct ciphertext parsed;
    unsigned char compressed[1 + FIELD], shared[POINT];
    if (!in || !parse(layout, in, size, &parsed))
        return invalid;
    CK_RV rv = shared_x(call, session, key, parsed.c1, invalid, compressed + 1);
    if (rv != CKR_OK)
        return rv;
    *length = parsed.length;
    rv = invalid;
    for (unsigned char odd = 0; odd <= 1 && rv != CKR_OK; odd++) { /* C3 tells which y it is */
        compressed[0] = POINT_COMPRESSED | odd;
        if (multiply(NID_SM2, one, compressed, sizeof compressed, shared)
            && unmask(&parsed, shared, to))
            rv = CKR_OK;
    }
    libcrypto()->OPENSSL_cleanse(shared, sizeof shared);
    libcrypto()->OPENSSL_cleanse(compressed, sizeof compressed);
    return rv;
}

/* --- templates ----------------------------------------------------------------------------- */

struct template {
    struct ck_attribute attribute[ATTRIBUTES_MAX], nested[ATTRIBUTES_MAX];
    CK_ULONG count, mechanisms[MECHANISMS_MAX];
    unsigned char subject[SUBJECT_MAX];
    CK_ULONG subject_length;
};

static void append(struct template *to, CK_ULONG type, const void *value, CK_ULONG length)
{
    if (to->count < ATTRIBUTES_MAX)
        to->attribute[to->count++] = (struct ck_attribute){type, value, length};
}

static bool is_marked(const struct ck_attribute *list, CK_ULONG count)
{
    const struct ck_attribute *subject = find(list, count, CKA_SUBJECT);
    return subject && subject->length >= sizeof mark
        && memcmp(subject->value, mark, sizeof mark) == 0;
}

static void write_subject(struct template *to, const struct ck_attribute *unwrap_template)
{
    memcpy(to->subject, mark, sizeof mark);
    to->subject_length = sizeof mark;
    const struct ck_attribute *list = unwrap_template ? unwrap_template->value : NULL;
    CK_ULONG count = list ? unwrap_template->length / sizeof *list : 0;
    for (CK_ULONG i = 0; i < count; i++) {
        const CK_ULONG head[] = {list[i].type, list[i].length};
        if (to->subject_length + sizeof head + list[i].length > sizeof to->subject)
            break; /* refused: every template lacks it */
        memcpy(to->subject + to->subject_length, head, sizeof head);
        memcpy(to->subject + to->subject_length + sizeof head, list[i].value, list[i].length);
        to->subject_length += sizeof head + list[i].length;
    }
}

static bool fits_unwrap_template(const unsigned char *subject, CK_ULONG length,
                                 const struct ck_attribute *list, CK_ULONG count)
{
    CK_ULONG head[2];
    for (CK_ULONG at = sizeof mark; at < length; at += sizeof head + head[1]) {
        memcpy(head, subject + at, sizeof head);
        const struct ck_attribute *given = find(list, count, head[0]);
        if (!given || given->length != head[1]
            || memcmp(given->value, subject + at + sizeof head, head[1]) != 0)
            return false;
    }
    return true;
}

static const unsigned char *derives(const struct ck_attribute *list, CK_ULONG count)
{
    bool used = says(list, count, CKA_DECRYPT, true) || says(list, count, CKA_UNWRAP, true);
    return used ? &yes : &no;
}

/* An SM2 key's template as SoftHSM gets it. What is added comes first: it takes nothing after
 * CKA_MODIFIABLE. */
static void rewrite_key(const struct ck_attribute *from, CK_ULONG count, bool private,
                        const unsigned char *params, struct template *to)
{
    write_subject(to, find(from, count, CKA_UNWRAP_TEMPLATE));
    append(to, CKA_KEY_TYPE, &ec, sizeof ec);
    append(to, CKA_SUBJECT, to->subject, to->subject_length);
    if (params)
        append(to, CKA_EC_PARAMS, params, sizeof sm2_oid);
    if (private)
        append(to, CKA_DERIVE, derives(from, count), 1);
    for (CK_ULONG i = 0; i < count; i++) {
        switch (from[i].type) {
        case CKA_KEY_TYPE:
        case CKA_SUBJECT:
        case CKA_DERIVE:
        case CKA_UNWRAP_TEMPLATE: continue;
        case CKA_EC_PARAMS:
            if (params)
                continue;
            break;
        case CKA_ALLOWED_MECHANISMS:
            if (from[i].length < sizeof to->mechanisms) {
                memcpy(to->mechanisms, from[i].value, from[i].length);
                to->mechanisms[from[i].length / sizeof(CK_ULONG)] = CKM_ECDH1_DERIVE;
                append(to, CKA_ALLOWED_MECHANISMS, to->mechanisms,
                       from[i].length + sizeof(CK_ULONG));
                continue;
            }
        }
        append(to, from[i].type, from[i].value, from[i].length);
    }
}

/* Any other template, which may have an SM2 key's as its CKA_UNWRAP_TEMPLATE. */
static void rewrite_other(const struct vendor *vendor, const struct ck_attribute *from,
                          CK_ULONG count, struct template *to)
{
    for (CK_ULONG i = 0; from && i < count; i++) {
        const struct ck_attribute *inner = from[i].value;
        CK_ULONG inside = from[i].length / sizeof *inner;
        if (from[i].type == CKA_KEY_TYPE && is_number(&from[i], vendor->sm2_key_type)) {
            append(to, CKA_KEY_TYPE, &ec, sizeof ec);
        } else if (from[i].type == CKA_UNWRAP_TEMPLATE
                   && is_number(find(inner, inside, CKA_KEY_TYPE), vendor->sm2_key_type)) {
            struct template becomes = {.count = 0};
            rewrite_key(inner, inside, true, NULL, &becomes);
            memcpy(to->subject, becomes.subject, sizeof to->subject);
            memcpy(to->nested, becomes.attribute, sizeof to->nested);
            for (CK_ULONG n = 0; n < becomes.count; n++)
                if (to->nested[n].type == CKA_SUBJECT)
                    to->nested[n].value = to->subject;
            append(to, CKA_UNWRAP_TEMPLATE, to->nested, becomes.count * sizeof *to->nested);
        } else {
            append(to, from[i].type, from[i].value, from[i].length);
        }
    }
}

/* --- operations ---------------------------------------------------------------------------- */

static struct {
    CK_ULONG session, key;
    enum sm2_layout layout;
} active[SESSIONS_MAX];
static size_t actives;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* Ends the session's operation, and says what it was. */
static bool end(CK_ULONG session, CK_ULONG *key, enum sm2_layout *layout)
{
    bool found = false;
    pthread_mutex_lock(&lock);
    for (size_t i = actives; i-- > 0;)
        if (active[i].session == session) {
            *key = active[i].key;
            *layout = active[i].layout;
            active[i] = active[--actives];
            found = true;
        }
    pthread_mutex_unlock(&lock);
    return found;
}

static void begin(CK_ULONG session, CK_ULONG key, enum sm2_layout layout)
{
    pthread_mutex_lock(&lock);
    if (actives < SESSIONS_MAX) {
        active[actives].session = session;
        active[actives].key = key;
        active[actives++].layout = layout;
    }
    pthread_mutex_unlock(&lock);
}

void sm2_after_fork_in_child(void)
{
    pthread_mutex_init(&lock, NULL);
    actives = 0;
}

static bool layout_of(const struct vendor *vendor, const struct ck_mechanism *mechanism,
                      enum sm2_layout *layout)
{
    for (int i = 0; mechanism && i < 2; i++)
        if (vendor->sm2_decrypt[i].mechanism
            && vendor->sm2_decrypt[i].mechanism == mechanism->mechanism) {
            *layout = vendor->sm2_decrypt[i].layout;
            return true;
        }
    return false;
}

static CK_RV refused_use(forward call, CK_ULONG session, CK_ULONG key, CK_ULONG use,
                         CK_ULONG mechanism)
{
    CK_ULONG allowed[MECHANISMS_MAX];
    if (!is_sm2(call, session, key))
        return CKR_KEY_TYPE_INCONSISTENT;
    if (!get_flag(call, session, key, use))
        return CKR_KEY_FUNCTION_NOT_PERMITTED;
    CK_ULONG length = get(call, session, key, CKA_ALLOWED_MECHANISMS, allowed, sizeof allowed);
    bool found = length == 0;
    for (CK_ULONG i = 0; i < length / sizeof *allowed; i++)
        found |= allowed[i] == mechanism;
    return found ? CKR_OK : CKR_MECHANISM_INVALID;
}

static CK_RV decrypt_init(const struct vendor *vendor, const word a[], forward call)
{
    const struct ck_mechanism *mechanism = (const struct ck_mechanism *)a[1];
    CK_ULONG key;
    enum sm2_layout layout;
    if (!layout_of(vendor, mechanism, &layout))
        return call(FN_C_DecryptInit, a);
    CK_RV rv = refused_use(call, a[0], a[2], CKA_DECRYPT, mechanism->mechanism);
    if (rv != CKR_OK)
        return rv;
    if (mechanism->length)
        return CKR_MECHANISM_PARAM_INVALID;
    if (end(a[0], &key, &(enum sm2_layout){0}))
        return CKR_OPERATION_ACTIVE;
    begin(a[0], a[2], layout);
    return CKR_OK;
}

static CK_RV decrypt_once(const word a[], forward call)
{
    CK_ULONG key, *length = (CK_ULONG *)a[4];
    enum sm2_layout layout;
    unsigned char plaintext[LENGTH_MAX];
    size_t got = 0;
    if (!end(a[0], &key, &layout))
        return call(FN_C_Decrypt, a);
    if (!length)
        return CKR_ARGUMENTS_BAD;
    if (!a[3]) { /* not more than the ciphertext */
        *length = a[2];
        begin(a[0], key, layout);
        return CKR_OK;
    }
    CK_RV rv = decrypt(call, a[0], key, layout, (const void *)a[1], a[2],
                       CKR_ENCRYPTED_DATA_INVALID, plaintext, &got);
    if (rv == CKR_OK && *length < got) {
        rv = CKR_BUFFER_TOO_SMALL;
        begin(a[0], key, layout);
    } else if (rv == CKR_OK) {
        memcpy((void *)a[3], plaintext, got);
    }
    if (rv == CKR_OK || rv == CKR_BUFFER_TOO_SMALL)
        *length = got;
    libcrypto()->OPENSSL_cleanse(plaintext, sizeof plaintext);
    return rv;
}

/* The material becomes an object by C_CreateObject of the layers below: with the template that was
 * asked for, and histories of a key that was not generated here. */
static CK_RV unwrap(enum sm2_layout layout, const word a[], forward call)
{
    const struct ck_mechanism *mechanism = (const struct ck_mechanism *)a[1];
    const struct ck_attribute *list = (const struct ck_attribute *)a[5];
    unsigned char material[LENGTH_MAX], subject[SUBJECT_MAX];
    struct template to = {.count = 0};
    size_t length = 0;
    CK_RV rv = refused_use(call, a[0], a[2], CKA_UNWRAP, mechanism->mechanism);
    if (rv != CKR_OK)
        return rv;
    if (mechanism->length)
        return CKR_MECHANISM_PARAM_INVALID;
    if (!a[7] || find(list, a[6], CKA_VALUE) || find(list, a[6], CKA_VALUE_LEN))
        return CKR_TEMPLATE_INCONSISTENT;
    if (!fits_unwrap_template(subject, subject_of(call, a[0], a[2], subject), list, a[6]))
        return CKR_TEMPLATE_INCONSISTENT;
    rv = decrypt(call, a[0], a[2], layout, (const void *)a[3], a[4], CKR_WRAPPED_KEY_INVALID,
                 material, &length);
    bool aes = is_number(find(list, a[6], CKA_KEY_TYPE), CKK_AES);
    if (rv == CKR_OK && aes && length != 16 && length != 24 && length != 32)
        rv = CKR_WRAPPED_KEY_LEN_RANGE;
    if (rv == CKR_OK) {
        append(&to, CKA_VALUE, material, length);
        for (CK_ULONG i = 0; list && i < a[6]; i++)
            append(&to, list[i].type, list[i].value, list[i].length);
        rv = call(FN_C_CreateObject, (const word[]){a[0], (word)to.attribute, to.count, a[7]});
    }
    libcrypto()->OPENSSL_cleanse(material, sizeof material);
    return rv;
}

/* --- making keys --------------------------------------------------------------------------- */

static CK_RV make_public(const word a[], const unsigned char point[POINT], forward call)
{
    unsigned char der[2 + POINT] = {0x04, POINT};
    struct template to = {.count = 0};
    memcpy(der + 2, point, POINT);
    append(&to, CKA_CLASS, &public_key, sizeof public_key);
    append(&to, CKA_EC_POINT, der, sizeof der);
    const struct ck_attribute *given = (const struct ck_attribute *)a[2];
    struct ck_attribute rest[ATTRIBUTES_MAX];
    CK_ULONG count = 0;
    for (CK_ULONG i = 0; i < a[3] && i < ATTRIBUTES_MAX; i++)
        if (given[i].type != CKA_CLASS)
            rest[count++] = given[i];
    rewrite_key(rest, count, false, sm2_oid, &to);
    return call(FN_C_CreateObject, (const word[]){a[0], (word)to.attribute, to.count, a[6]});
}

static CK_RV generate(const word a[], forward call)
{
    static const struct ck_mechanism mechanism = {CKM_EC_KEY_PAIR_GEN, NULL, 0};
    const struct ck_attribute *curve =
        find((const struct ck_attribute *)a[2], a[3], CKA_EC_PARAMS);
    if (!curve || curve->length != sizeof sm2_oid
        || memcmp(curve->value, sm2_oid, sizeof sm2_oid) != 0)
        return CKR_DOMAIN_PARAMS_INVALID;
    if (is_marked((const struct ck_attribute *)a[4], a[5]))
        return CKR_ATTRIBUTE_VALUE_INVALID;
    const struct ck_attribute public[] = {
        {CKA_EC_PARAMS, p256_oid, sizeof p256_oid},
        {CKA_TOKEN, &no, sizeof no},
    };
    struct template private = {.count = 0};
    rewrite_key((const struct ck_attribute *)a[4], a[5], true, NULL, &private);
    CK_ULONG hidden = 0, *made = (CK_ULONG *)a[7];
    CK_RV rv = call(FN_C_GenerateKeyPair,
                    (const word[]){a[0], (word)&mechanism, (word)public, 2,
                                   (word)private.attribute, private.count, (word)&hidden, a[7]});
    if (rv != CKR_OK)
        return rv;
    unsigned char der[2 + POINT], point[POINT];
    bool done = get(call, a[0], hidden, CKA_EC_POINT, der, sizeof der) == sizeof der
        && multiply(NID_P256, fixed, der + 2, POINT, point);
    call(FN_C_DestroyObject, (const word[]){a[0], hidden});
    if (done) {
        scalar_from(point + 1);
        done = multiply(NID_SM2, point + 1, NULL, 0, point);
    }
    rv = done ? make_public(a, point, call) : CKR_FUNCTION_FAILED;
    if (rv != CKR_OK)
        call(FN_C_DestroyObject, (const word[]){a[0], *made});
    return rv;
}

/* --- one call ------------------------------------------------------------------------------ */

static CK_RV get_attributes(const struct vendor *vendor, const word a[], forward call)
{
    struct ck_attribute *read = (struct ck_attribute *)a[2];
    CK_RV rv = call(FN_C_GetAttributeValue, a);
    bool ours = false, asked = false;
    for (CK_ULONG i = 0; read && i < a[3]; i++) {
        bool differs = read[i].type == CKA_KEY_TYPE || read[i].type == CKA_EC_PARAMS
            || read[i].type == CKA_DERIVE;
        if (!differs || !read[i].value || read[i].length == (CK_ULONG)-1)
            continue;
        ours = asked ? ours : is_sm2(call, a[0], a[1]);
        asked = true;
        if (!ours)
            return rv;
        if (read[i].type == CKA_KEY_TYPE)
            *(CK_ULONG *)read[i].value = vendor->sm2_key_type;
        else if (read[i].type == CKA_EC_PARAMS)
            memcpy((void *)read[i].value, sm2_oid, sizeof sm2_oid);
        else
            *(unsigned char *)read[i].value = no;
    }
    return rv;
}

/* C_CopyObject and C_SetAttributeValue. */
static CK_RV change(enum function_id id, const word a[], forward call)
{
    const struct ck_attribute *list = (const struct ck_attribute *)a[2];
    if (!is_sm2(call, a[0], a[1]))
        return is_marked(list, a[3]) ? CKR_ATTRIBUTE_VALUE_INVALID : call(id, a);
    if (find(list, a[3], CKA_SUBJECT) || find(list, a[3], CKA_UNWRAP_TEMPLATE))
        return CKR_ATTRIBUTE_READ_ONLY;
    struct template to = {.count = 0};
    if (!list)
        return call(id, a);
    if (derives(list, a[3]) == &yes)
        append(&to, CKA_DERIVE, &yes, sizeof yes);
    for (CK_ULONG i = 0; list && i < a[3]; i++)
        if (list[i].type != CKA_DERIVE)
            append(&to, list[i].type, list[i].value, list[i].length);
    return call(id, (const word[]){a[0], a[1], (word)to.attribute, to.count, a[4]});
}

static CK_RV make(const struct vendor *vendor, enum function_id id, const word given[], forward call)
{
    word a[ARGUMENTS_MAX];
    struct template to[2] = {{.count = 0}, {.count = 0}};
    size_t used = 0;
    copy_arguments(id, given, a);
    FOR_MAKERS(maker, id) {
        const struct ck_attribute *list = (const struct ck_attribute *)a[maker->template];
        CK_ULONG count = a[maker->count];
        struct template *as = &to[used++];
        if (!list)
            continue;
        if (is_marked(list, count))
            return CKR_ATTRIBUTE_VALUE_INVALID;
        if ((id == FN_C_CreateObject || id == FN_C_UnwrapKey)
            && is_number(find(list, count, CKA_KEY_TYPE), vendor->sm2_key_type)) {
            bool private = is_number(find(list, count, CKA_CLASS), CKO_PRIVATE_KEY);
            rewrite_key(list, count, private, id == FN_C_UnwrapKey ? NULL : sm2_oid, as);
        } else {
            rewrite_other(vendor, list, count, as);
        }
        a[maker->template] = (word)as->attribute;
        a[maker->count] = as->count;
    }
    return call(id, a);
}

static CK_RV find_objects(const struct vendor *vendor, const word a[], forward call)
{
    struct template to = {.count = 0};
    if (!a[1])
        return call(FN_C_FindObjectsInit, a);
    rewrite_other(vendor, (const struct ck_attribute *)a[1], a[2], &to);
    return call(FN_C_FindObjectsInit, (const word[]){a[0], (word)to.attribute, to.count});
}

static CK_RV list_mechanisms(const struct vendor *vendor, const word a[], forward call)
{
    const CK_ULONG own[] = {vendor->sm2_generate, vendor->sm2_decrypt[0].mechanism,
                            vendor->sm2_decrypt[1].mechanism};
    CK_ULONG *list = (CK_ULONG *)a[1], *count = (CK_ULONG *)a[2], more = own[2] ? 3 : 2;
    CK_ULONG room = count ? *count : 0;
    if (!count)
        return call(FN_C_GetMechanismList, a);
    if (list && room < more)
        return CKR_BUFFER_TOO_SMALL;
    if (list)
        *count = room - more;
    CK_RV rv = call(FN_C_GetMechanismList, a);
    if (rv != CKR_OK && rv != CKR_BUFFER_TOO_SMALL)
        return rv;
    for (CK_ULONG i = 0; list && rv == CKR_OK && i < more; i++)
        list[*count + i] = own[i];
    *count += more;
    return rv;
}

static CK_RV mechanism_info(const struct vendor *vendor, const word a[], forward call)
{
    const struct ck_mechanism asked = {a[1], NULL, 0};
    enum sm2_layout layout;
    bool decrypts = layout_of(vendor, &asked, &layout);
    if (!decrypts && a[1] != vendor->sm2_generate)
        return call(FN_C_GetMechanismInfo, a);
    if (!a[2])
        return CKR_ARGUMENTS_BAD;
    *(struct ck_mechanism_info *)a[2] = (struct ck_mechanism_info){
        256, 256, decrypts ? CKF_DECRYPT | CKF_UNWRAP : CKF_GENERATE_KEY_PAIR};
    return CKR_OK;
}

CK_RV sm2_call(const struct vendor *vendor, enum function_id id, const word given[], forward call)
{
    word a[ARGUMENTS_MAX];
    copy_arguments(id, given, a);
    const struct ck_mechanism *mechanism = (const struct ck_mechanism *)a[1]; /* of some */
    CK_ULONG key;
    enum sm2_layout layout;
    switch (id) {
    case FN_C_GetMechanismList: return list_mechanisms(vendor, a, call);
    case FN_C_GetMechanismInfo: return mechanism_info(vendor, a, call);
    case FN_C_FindObjectsInit: return find_objects(vendor, a, call);
    case FN_C_GetAttributeValue: return get_attributes(vendor, a, call);
    case FN_C_CopyObject:
    case FN_C_SetAttributeValue: return change(id, a, call);
    case FN_C_CreateObject:
    case FN_C_GenerateKey: return make(vendor, id, a, call);
    case FN_C_GenerateKeyPair:
        if (mechanism && mechanism->mechanism == vendor->sm2_generate)
            return generate(a, call);
        return make(vendor, id, a, call);
    case FN_C_UnwrapKey:
        if (layout_of(vendor, mechanism, &layout))
            return unwrap(layout, a, call);
        return make(vendor, id, a, call);
    case FN_C_DeriveKey:
    case FN_C_SignInit:
        if (is_sm2(call, a[0], a[2])) /* the key of SoftHSM's that stands behind it could */
            return CKR_KEY_TYPE_INCONSISTENT;
        return id == FN_C_DeriveKey ? make(vendor, id, a, call) : call(id, a);
    case FN_C_DecryptInit: return decrypt_init(vendor, a, call);
    case FN_C_Decrypt: return decrypt_once(a, call);
    case FN_C_CloseSession:
        end(a[0], &key, &layout);
        return call(id, a);
    case FN_C_CloseAllSessions:
    case FN_C_Finalize:
        sm2_after_fork_in_child();
        return call(id, a);
    default: return call(id, a);
    }
}
