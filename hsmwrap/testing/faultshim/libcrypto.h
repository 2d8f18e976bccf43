/* OpenSSL 3's libcrypto, loaded when a vendor is played: the shim needs neither its headers nor,
 * for anything else, the library. Another function is added here, by its prototype.
 */
#ifndef HSMWRAP_LIBCRYPTO_H
#define HSMWRAP_LIBCRYPTO_H

#include <stddef.h>

#define LIBCRYPTO(X)                                                                         \
    X(void *, BN_CTX_new, (void))                                                            \
    X(void, BN_CTX_free, (void *context))                                                    \
    X(void *, BN_bin2bn, (const unsigned char *from, int length, void *number))              \
    X(void, BN_clear_free, (void *number))                                                   \
    X(void *, EC_GROUP_new_by_curve_name, (int nid))                                         \
    X(void, EC_GROUP_free, (void *group))                                                    \
    X(void *, EC_POINT_new, (const void *group))                                             \
    X(void, EC_POINT_clear_free, (void *point))                                              \
    X(int, EC_POINT_mul, (const void *group, void *result, const void *of_generator,         \
                          const void *point, const void *of_point, void *context))           \
    X(int, EC_POINT_oct2point, (const void *group, void *point, const unsigned char *from,   \
                                size_t length, void *context))                               \
    X(size_t, EC_POINT_point2oct, (const void *group, const void *point, int form,           \
                                   unsigned char *to, size_t length, void *context))         \
    X(const void *, EVP_sm3, (void))                                                         \
    X(int, EVP_Digest, (const void *data, size_t length, unsigned char *to, unsigned *size,  \
                        const void *type, void *engine))                                     \
    X(void *, EVP_CIPHER_CTX_new, (void))                                                    \
    X(void, EVP_CIPHER_CTX_free, (void *context))                                            \
    X(int, EVP_CIPHER_CTX_set_padding, (void *context, int padding))                         \
    X(int, EVP_CipherInit_ex, (void *context, const void *cipher, void *engine,              \
                               const unsigned char *key, const unsigned char *iv, int mode)) \
    X(int, EVP_CipherUpdate, (void *context, unsigned char *to, int *written,                \
                              const unsigned char *from, int length))                        \
    X(const void *, EVP_aes_128_ecb, (void))                                                 \
    X(const void *, EVP_sm4_ecb, (void))                                                     \
    X(const void *, EVP_sm4_cbc, (void))                                                     \
    X(const void *, EVP_sm4_ctr, (void))                                                     \
    X(void, OPENSSL_cleanse, (void *memory, size_t length))                                  \
    X(void, ERR_clear_error, (void))

#define LIBCRYPTO_MEMBER(result, name, arguments) result(*name) arguments;
struct libcrypto {
    LIBCRYPTO(LIBCRYPTO_MEMBER)
};
#undef LIBCRYPTO_MEMBER

enum { NID_P256 = 415, NID_SM2 = 1172 };
enum { POINT_COMPRESSED = 2, POINT_UNCOMPRESSED = 4 };

/* NULL where it is not there, or lacks a function. */
const struct libcrypto *libcrypto(void);

#endif
