/* A simulated SDF device for tests: protects nothing.
 *
 * The device is a directory, which SDF_SIMULATOR names when the device is opened. In it, pair-N is
 * the private scalar of the SM2 pair under index N, kek-N a key-encryption key, and `password` what
 * gives the right to use any private key. Other processes on the directory have the same device.
 *
 * Compiled with EDITION=2023 (otherwise it is 2012) it has no SDF_ExchangeDigitEnvelopeBaseOnECC.
 *
 * Functions that begin with SIM_ are for tests: they make keys, let a call fail, count calls and
 * handles.
 */
#define _GNU_SOURCE
#include "sdf.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifndef EDITION
#define EDITION 2012
#endif

/* From OpenSSL's headers, so that the tests need none of them. */
typedef struct bignum_st BIGNUM;
typedef struct bignum_ctx BN_CTX;
typedef struct ec_group_st EC_GROUP;
typedef struct ec_point_st EC_POINT;
typedef struct evp_cipher_st EVP_CIPHER;
typedef struct evp_cipher_ctx_st EVP_CIPHER_CTX;
typedef struct evp_md_st EVP_MD;
typedef struct engine_st ENGINE;
BIGNUM *BN_new(void);
void BN_clear_free(BIGNUM *);
BIGNUM *BN_bin2bn(const unsigned char *, int, BIGNUM *);
int BN_bn2binpad(const BIGNUM *, unsigned char *, int);
int BN_priv_rand_range(BIGNUM *, const BIGNUM *);
EC_GROUP *EC_GROUP_new_by_curve_name(int);
const BIGNUM *EC_GROUP_get0_order(const EC_GROUP *);
EC_POINT *EC_POINT_new(const EC_GROUP *);
void EC_POINT_free(EC_POINT *);
int EC_POINT_set_affine_coordinates(const EC_GROUP *, EC_POINT *, const BIGNUM *, const BIGNUM *,
                                    BN_CTX *);
int EC_POINT_get_affine_coordinates(const EC_GROUP *, const EC_POINT *, BIGNUM *, BIGNUM *,
                                    BN_CTX *);
int EC_POINT_mul(const EC_GROUP *, EC_POINT *, const BIGNUM *, const EC_POINT *, const BIGNUM *,
                 BN_CTX *);
const EVP_MD *EVP_sm3(void);
int EVP_Digest(const void *, size_t, unsigned char *, unsigned int *, const EVP_MD *, ENGINE *);
const EVP_CIPHER *EVP_sm4_ecb(void);
const EVP_CIPHER *EVP_sm4_cbc(void);
EVP_CIPHER_CTX *EVP_CIPHER_CTX_new(void);
void EVP_CIPHER_CTX_free(EVP_CIPHER_CTX *);
int EVP_CIPHER_CTX_set_padding(EVP_CIPHER_CTX *, int);
int EVP_CipherInit_ex(EVP_CIPHER_CTX *, const EVP_CIPHER *, ENGINE *, const unsigned char *,
                      const unsigned char *, int);
int EVP_CipherUpdate(EVP_CIPHER_CTX *, unsigned char *, int *, const unsigned char *, int);
int RAND_bytes(unsigned char *, int);
int CRYPTO_memcmp(const void *, const void *, size_t);
enum { NID_sm2 = 1172 };

enum { FIELD = 32, BLOCK = 16, LONGEST_KEY = 32, SESSIONS = 64, KEYS = 1024, INDEXES = 4096 };
enum { PADDING = SDF_COORDINATE - FIELD, LONGEST_NAME = 64, FUNCTIONS = 32 };

typedef struct {
    int used;
    unsigned char rights[INDEXES];
} session_state;

typedef struct {
    session_state *session; /* NULL: not used */
    unsigned int length;
    unsigned char value[LONGEST_KEY];
} key_state;

static struct {
    pthread_mutex_t lock;
    int directory, devices; /* the directory's descriptor, and how many devices are open */
    session_state sessions[SESSIONS];
    key_state keys[KEYS];
    struct {
        char function[LONGEST_NAME];
        unsigned int code, times, calls;
    } faults[FUNCTIONS]; /* of the functions that were named, in that order */
} sim = {.lock = PTHREAD_MUTEX_INITIALIZER, .directory = -1};

static void lock(void) { pthread_mutex_lock(&sim.lock); }
static void unlock(void) { pthread_mutex_unlock(&sim.lock); }
__attribute__((constructor)) static void survive_forks(void) { pthread_atfork(lock, unlock, unlock); }

/* --- for tests ------------------------------------------------------------------------------- */

/* Under the lock: the entry of a function, which is counted from its first entry on. */
static int entry_of(const char *function) {
    int at = 0;
    while (*sim.faults[at].function && strcmp(sim.faults[at].function, function)) at++;
    snprintf(sim.faults[at].function, LONGEST_NAME, "%s", function);
    return at;
}

/* The next calls of a function answer a code. */
void SIM_Fail(const char *function, unsigned int code, unsigned int times) {
    lock();
    int at = entry_of(function);
    sim.faults[at].code = code;
    sim.faults[at].times = times;
    unlock();
}

unsigned int SIM_Calls(const char *function) {
    lock();
    unsigned int calls = sim.faults[entry_of(function)].calls;
    unlock();
    return calls;
}

/* Key handles that exist in this process. */
unsigned int SIM_Keys(void) {
    unsigned int count = 0;
    lock();
    for (int at = 0; at < KEYS; at++) count += sim.keys[at].session != NULL;
    unlock();
    return count;
}

/* Sessions that are open in this process. */
unsigned int SIM_Sessions(void) {
    unsigned int count = 0;
    lock();
    for (int at = 0; at < SESSIONS; at++) count += sim.sessions[at].used;
    unlock();
    return count;
}

static unsigned int fault(const char *function) {
    unsigned int code = SDR_OK;
    lock();
    int at = entry_of(function);
    sim.faults[at].calls++;
    if (sim.faults[at].times) sim.faults[at].times--, code = sim.faults[at].code;
    unlock();
    return code;
}

#define ENTER()                                             \
    do {                                                    \
        unsigned int planned_ = fault(__func__);            \
        if (planned_ != SDR_OK) return (int)planned_;       \
    } while (0)

/* --- SM2 and SM4 ------------------------------------------------------------------------------ */

static EC_GROUP *curve(void) {
    static EC_GROUP *group;
    lock();
    if (!group) group = EC_GROUP_new_by_curve_name(NID_sm2);
    unlock();
    return group;
}

/* The point scalar · (x, y), or scalar · G where x is NULL; 0 if it cannot be. */
static int multiply(const unsigned char scalar[FIELD], const unsigned char *x,
                    const unsigned char *y, unsigned char to_x[FIELD], unsigned char to_y[FIELD]) {
    EC_GROUP *group = curve();
    EC_POINT *point = EC_POINT_new(group), *product = EC_POINT_new(group);
    BIGNUM *by = BN_bin2bn(scalar, FIELD, NULL), *bx = BN_new(), *bn = BN_new();
    int good = 1;
    if (x) {
        BN_bin2bn(x, FIELD, bx);
        BN_bin2bn(y, FIELD, bn);
        good = EC_POINT_set_affine_coordinates(group, point, bx, bn, NULL) == 1;
    }
    good = good && EC_POINT_mul(group, product, x ? NULL : by, x ? point : NULL, x ? by : NULL, NULL) == 1
        && EC_POINT_get_affine_coordinates(group, product, bx, bn, NULL) == 1
        && BN_bn2binpad(bx, to_x, FIELD) == FIELD && BN_bn2binpad(bn, to_y, FIELD) == FIELD;
    BN_clear_free(by);
    BN_clear_free(bx);
    BN_clear_free(bn);
    EC_POINT_free(point);
    EC_POINT_free(product);
    return good;
}

static int random_scalar(unsigned char to[FIELD]) {
    BIGNUM *number = BN_new();
    int good = BN_priv_rand_range(number, EC_GROUP_get0_order(curve())) == 1
        && BN_bn2binpad(number, to, FIELD) == FIELD;
    BN_clear_free(number);
    return good;
}

/* GB/T 32918.4: the mask of up to one hash, and C3. */
static void mask_of(const unsigned char x2[FIELD], const unsigned char y2[FIELD],
                    unsigned char mask[SDF_HASH]) {
    unsigned char input[2 * FIELD + 4] = {[2 * FIELD + 3] = 1};
    memcpy(input, x2, FIELD);
    memcpy(input + FIELD, y2, FIELD);
    EVP_Digest(input, sizeof input, mask, NULL, EVP_sm3(), NULL);
}

static void hash_of(const unsigned char x2[FIELD], const unsigned char *data, unsigned int length,
                    const unsigned char y2[FIELD], unsigned char hash[SDF_HASH]) {
    unsigned char input[2 * FIELD + LONGEST_KEY];
    memcpy(input, x2, FIELD);
    memcpy(input + FIELD, data, length);
    memcpy(input + FIELD + length, y2, FIELD);
    EVP_Digest(input, 2 * FIELD + length, hash, NULL, EVP_sm3(), NULL);
}

static unsigned int sm2_encrypt(const ECCrefPublicKey *key, const unsigned char *data,
                                unsigned int length, ECCCipher *out) {
    unsigned char k[FIELD], x2[FIELD], y2[FIELD], mask[SDF_HASH];
    if (!length || length > LONGEST_KEY) return SDR_INARGERR;
    memset(out, 0, sizeof *out);
    if (!random_scalar(k) || !multiply(k, NULL, NULL, out->x + PADDING, out->y + PADDING)
        || !multiply(k, key->x + PADDING, key->y + PADDING, x2, y2))
        return SDR_KEYERR;
    mask_of(x2, y2, mask);
    hash_of(x2, data, length, y2, out->M);
    out->L = length;
    for (unsigned int at = 0; at < length; at++) out->C[at] = data[at] ^ mask[at];
    return SDR_OK;
}

static unsigned int sm2_decrypt(const unsigned char scalar[FIELD], const ECCCipher *in,
                                unsigned char *data) {
    unsigned char x2[FIELD], y2[FIELD], mask[SDF_HASH], hash[SDF_HASH];
    if (!in->L || in->L > LONGEST_KEY) return SDR_INARGERR;
    if (!multiply(scalar, in->x + PADDING, in->y + PADDING, x2, y2)) return SDR_ENCDATAERR;
    mask_of(x2, y2, mask);
    for (unsigned int at = 0; at < in->L; at++) data[at] = in->C[at] ^ mask[at];
    hash_of(x2, data, in->L, y2, hash);
    return CRYPTO_memcmp(hash, in->M, SDF_HASH) ? SDR_ENCDATAERR : SDR_OK;
}

static int sm4(const EVP_CIPHER *cipher, int encrypt, const unsigned char key[BLOCK],
               const unsigned char *iv, const unsigned char *in, unsigned int length,
               unsigned char *out) {
    EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();
    int written = 0;
    int good = EVP_CipherInit_ex(context, cipher, NULL, key, iv, encrypt) == 1
        && EVP_CIPHER_CTX_set_padding(context, 0) == 1
        && EVP_CipherUpdate(context, out, &written, in, (int)length) == 1
        && written == (int)length;
    EVP_CIPHER_CTX_free(context);
    return good;
}

/* --- keys of the device ----------------------------------------------------------------------- */

/* Reads a file of the device; its length, or -1. */
static int read_file(const char *kind, unsigned int index, unsigned char *to, size_t room) {
    char name[LONGEST_NAME];
    snprintf(name, sizeof name, index == UINT32_MAX ? "%s" : "%s-%u", kind, index);
    int file = openat(sim.directory, name, O_RDONLY | O_CLOEXEC);
    if (file < 0) return -1;
    int length = (int)read(file, to, room);
    close(file);
    return length;
}

static int write_file(const char *directory, const char *kind, unsigned int index,
                      const unsigned char *what, size_t length) {
    char name[4096];
    snprintf(name, sizeof name, "%s/%s-%u", directory, kind, index);
    int file = open(name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    int good = file >= 0 && write(file, what, length) == (ssize_t)length;
    close(file);
    return good;
}

/* What the device's management tool does: makes pairs under the indexes from first on; 1 if done. */
int SIM_MakePairs(const char *directory, unsigned int first, unsigned int count) {
    for (unsigned int index = first; index < first + count; index++) {
        unsigned char scalar[FIELD];
        if (!random_scalar(scalar) || !write_file(directory, "pair", index, scalar, FIELD)) return 0;
    }
    return 1;
}

int SIM_MakeKek(const char *directory, unsigned int index) {
    unsigned char key[BLOCK];
    return RAND_bytes(key, BLOCK) == 1 && write_file(directory, "kek", index, key, BLOCK);
}

static session_state *session_of(void *handle) {
    session_state *session = handle;
    int ours = session >= sim.sessions && session < sim.sessions + SESSIONS && session->used;
    return ours ? session : NULL;
}

/* The private key, if this session has the right to use it. */
static unsigned int private_key(void *handle, unsigned int index, unsigned char scalar[FIELD]) {
    session_state *session = session_of(handle);
    if (!session || index >= INDEXES) return SDR_INARGERR;
    if (read_file("pair", index, scalar, FIELD) != FIELD) return SDR_KEYNOTEXIST;
    return session->rights[index] ? SDR_OK : SDR_PARDENY;
}

static unsigned int keep(void *session, const unsigned char *value, unsigned int length,
                         void **handle) {
    unsigned int code = SDR_NOBUFFER;
    if (!session_of(session)) return SDR_INARGERR;
    lock();
    for (int at = 0; at < KEYS && code; at++) {
        if (sim.keys[at].session) continue;
        sim.keys[at].session = session;
        sim.keys[at].length = length;
        memcpy(sim.keys[at].value, value, length);
        *handle = &sim.keys[at];
        code = SDR_OK;
    }
    unlock();
    return code;
}

static key_state *key_of(void *session, void *handle) {
    key_state *key = handle;
    int ours = key >= sim.keys && key < sim.keys + KEYS && key->session && key->session == session;
    return ours ? key : NULL;
}

/* --- the interface ---------------------------------------------------------------------------- */

int SDF_OpenDevice(void **device) {
    ENTER();
    const char *path = getenv("SDF_SIMULATOR");
    int directory = path ? open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
    if (directory < 0) return 0x01000005; /* the device does not open */
    lock();
    if (sim.directory >= 0) close(sim.directory);
    sim.directory = directory;
    sim.devices++;
    unlock();
    *device = &sim;
    return SDR_OK;
}

int SDF_CloseDevice(void *device) {
    ENTER();
    if (device != &sim) return SDR_INARGERR;
    lock();
    sim.devices--;
    unlock();
    return SDR_OK;
}

int SDF_OpenSession(void *device, void **handle) {
    ENTER();
    int code = SDR_NOBUFFER;
    if (device != &sim || !sim.devices) return SDR_INARGERR;
    lock();
    for (int at = 0; at < SESSIONS && code; at++) {
        if (sim.sessions[at].used) continue;
        memset(&sim.sessions[at], 0, sizeof sim.sessions[at]);
        sim.sessions[at].used = 1;
        *handle = &sim.sessions[at];
        code = SDR_OK;
    }
    unlock();
    return code;
}

int SDF_CloseSession(void *handle) {
    ENTER();
    session_state *session = session_of(handle);
    if (!session) return SDR_INARGERR;
    lock();
    for (int at = 0; at < KEYS; at++)
        if (sim.keys[at].session == session) memset(&sim.keys[at], 0, sizeof sim.keys[at]);
    session->used = 0;
    unlock();
    return SDR_OK;
}

int SDF_GetDeviceInfo(void *session, DEVICEINFO *info) {
    ENTER();
    if (!session_of(session)) return SDR_INARGERR;
    *info = (DEVICEINFO){"hsmwrap", "simulated", "serial number", 0x00010203, EDITION < 2023 ? 1 : 2,
                         {0}, 0, 0, 0};
    return SDR_OK;
}

int SDF_GetPrivateKeyAccessRight(void *handle, unsigned int index, unsigned char *password,
                                 unsigned int length) {
    ENTER();
    unsigned char right[128];
    session_state *session = session_of(handle);
    int stored = read_file("password", UINT32_MAX, right, sizeof right);
    if (!session || index >= INDEXES || length < 8) return SDR_INARGERR;
    if (stored != (int)length || CRYPTO_memcmp(right, password, length)) return SDR_PRKRERR;
    session->rights[index] = 1;
    return SDR_OK;
}

int SDF_ReleasePrivateKeyAccessRight(void *handle, unsigned int index) {
    ENTER();
    session_state *session = session_of(handle);
    if (!session || index >= INDEXES) return SDR_INARGERR;
    session->rights[index] = 0;
    return SDR_OK;
}

int SDF_ExportEncPublicKey_ECC(void *session, unsigned int index, ECCrefPublicKey *key) {
    ENTER();
    unsigned char scalar[FIELD];
    unsigned int code = private_key(session, index, scalar);
    if (code != SDR_OK && code != SDR_PARDENY) return (int)code;
    memset(key, 0, sizeof *key);
    key->bits = 8 * FIELD;
    return multiply(scalar, NULL, NULL, key->x + PADDING, key->y + PADDING) ? SDR_OK : SDR_KEYERR;
}

int SDF_ImportKeyWithISK_ECC(void *session, unsigned int index, ECCCipher *key, void **handle) {
    ENTER();
    unsigned char scalar[FIELD], value[LONGEST_KEY];
    unsigned int code = private_key(session, index, scalar);
    if (code == SDR_OK) code = sm2_decrypt(scalar, key, value);
    return (int)(code == SDR_OK ? keep(session, value, key->L, handle) : code);
}

int SDF_GenerateKeyWithKEK(void *session, unsigned int bits, unsigned int algorithm,
                           unsigned int index, unsigned char *key, unsigned int *length,
                           void **handle) {
    ENTER();
    unsigned char kek[BLOCK], value[BLOCK];
    if (algorithm != SGD_SM4_ECB) return SDR_ALGNOTSUPPORT;
    if (bits != 8 * BLOCK) return SDR_INARGERR;
    if (read_file("kek", index, kek, BLOCK) != BLOCK) return SDR_KEYNOTEXIST;
    if (RAND_bytes(value, BLOCK) != 1 || !sm4(EVP_sm4_ecb(), 1, kek, NULL, value, BLOCK, key))
        return SDR_SYMOPERR;
    *length = BLOCK;
    return (int)keep(session, value, BLOCK, handle);
}

int SDF_ImportKeyWithKEK(void *session, unsigned int algorithm, unsigned int index,
                         unsigned char *key, unsigned int length, void **handle) {
    ENTER();
    unsigned char kek[BLOCK], value[BLOCK];
    if (algorithm != SGD_SM4_ECB) return SDR_ALGNOTSUPPORT;
    if (length != BLOCK) return SDR_INARGERR;
    if (read_file("kek", index, kek, BLOCK) != BLOCK) return SDR_KEYNOTEXIST;
    if (!sm4(EVP_sm4_ecb(), 0, kek, NULL, key, BLOCK, value)) return SDR_SYMOPERR;
    return (int)keep(session, value, BLOCK, handle);
}

int SDF_DestroyKey(void *session, void *handle) {
    ENTER();
    key_state *key = key_of(session, handle);
    if (!key) return SDR_KEYNOTEXIST;
    lock();
    memset(key, 0, sizeof *key);
    unlock();
    return SDR_OK;
}

#if EDITION < 2023
int SDF_ExchangeDigitEnvelopeBaseOnECC(void *session, unsigned int index, unsigned int algorithm,
                                       ECCrefPublicKey *to, ECCCipher *in, ECCCipher *out) {
    ENTER();
    unsigned char scalar[FIELD], value[LONGEST_KEY];
    if (algorithm != SGD_SM2_3) return SDR_ALGNOTSUPPORT;
    unsigned int code = private_key(session, index, scalar);
    if (code == SDR_OK) code = sm2_decrypt(scalar, in, value);
    return (int)(code == SDR_OK ? sm2_encrypt(to, value, in->L, out) : code);
}
#endif

int SDF_ExternalEncrypt_ECC(void *session, unsigned int algorithm, ECCrefPublicKey *key,
                            unsigned char *data, unsigned int length, ECCCipher *encrypted) {
    ENTER();
    if (!session_of(session)) return SDR_INARGERR;
    if (algorithm != SGD_SM2_3) return SDR_ALGNOTSUPPORT;
    return (int)sm2_encrypt(key, data, length, encrypted);
}

int SDF_Encrypt(void *session, void *handle, unsigned int algorithm, unsigned char *iv,
                unsigned char *data, unsigned int length, unsigned char *encrypted,
                unsigned int *encrypted_length) {
    ENTER();
    key_state *key = key_of(session, handle);
    if (!key) return SDR_KEYNOTEXIST;
    if (algorithm != SGD_SM4_ECB && algorithm != SGD_SM4_CBC) return SDR_ALGNOTSUPPORT;
    if (!length || length % BLOCK || key->length != BLOCK) return SDR_INARGERR;
    int chained = algorithm == SGD_SM4_CBC;
    const EVP_CIPHER *cipher = chained ? EVP_sm4_cbc() : EVP_sm4_ecb();
    if (!sm4(cipher, 1, key->value, chained ? iv : NULL, data, length, encrypted))
        return SDR_SYMOPERR;
    if (chained) memcpy(iv, encrypted + length - BLOCK, BLOCK);
    *encrypted_length = length;
    return SDR_OK;
}
