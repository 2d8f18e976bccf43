/* RSA key generation of OpenSSL that takes time only for the first keys.
 *
 * Preloaded into a process that generates hundreds of RSA pairs in SoftHSM and tests everything but
 * their generation: the first KEYS pairs of 2048 bits are generated; then they come again, in turns.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>

/* From openssl/rsa.h, so that the tests need no header of OpenSSL. */
typedef struct rsa_st RSA;
typedef struct bignum_st BIGNUM;
typedef const BIGNUM *Part;
BIGNUM *BN_dup(Part);
RSA *RSAPrivateKey_dup(const RSA *);
void RSA_get0_key(const RSA *, Part *n, Part *e, Part *d);
void RSA_get0_factors(const RSA *, Part *p, Part *q);
void RSA_get0_crt_params(const RSA *, Part *dp, Part *dq, Part *qi);
int RSA_set0_key(RSA *, BIGNUM *n, BIGNUM *e, BIGNUM *d);
int RSA_set0_factors(RSA *, BIGNUM *p, BIGNUM *q);
int RSA_set0_crt_params(RSA *, BIGNUM *dp, BIGNUM *dq, BIGNUM *qi);

enum { KEYS = 4, BITS = 2048 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static RSA *keys[KEYS];
static unsigned given;

static int generate(RSA *rsa, int bits, BIGNUM *e, void *callback)
{
    int (*real)(RSA *, int, BIGNUM *, void *);
    *(void **)&real = dlsym(RTLD_NEXT, "RSA_generate_key_ex");
    return real ? real(rsa, bits, e, callback) : 0;
}

static int give(RSA *rsa, const RSA *key)
{
    Part n, e, d, p, q, dp, dq, qi;
    RSA_get0_key(key, &n, &e, &d);
    RSA_get0_factors(key, &p, &q);
    RSA_get0_crt_params(key, &dp, &dq, &qi);
    return RSA_set0_key(rsa, BN_dup(n), BN_dup(e), BN_dup(d)) &&
           RSA_set0_factors(rsa, BN_dup(p), BN_dup(q)) &&
           RSA_set0_crt_params(rsa, BN_dup(dp), BN_dup(dq), BN_dup(qi));
}

int RSA_generate_key_ex(RSA *rsa, int bits, BIGNUM *e, void *callback)
{
    if (bits != BITS)
        return generate(rsa, bits, e, callback);
    pthread_mutex_lock(&lock);
    RSA **key = &keys[given++ % KEYS];
    int done;
    if (*key) {
        done = give(rsa, *key);
    } else {
        done = generate(rsa, bits, e, callback);
        if (done)
            *key = RSAPrivateKey_dup(rsa);
    }
    pthread_mutex_unlock(&lock);
    return done;
}
