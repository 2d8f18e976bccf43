/* RSA key generation of OpenSSL that takes no time: each pair is two primes of a list.
 *
 * Preloaded into the processes of a test run. SoftHSM spends most of its time on the search for
 * primes, and no test is about that search. The pairs are as different as generated ones: no two
 * pairs of a run have the same modulus, in whatever processes they are made. Other sizes than 2048
 * bits, other exponents, and pairs beyond the list's end are generated.
 *
 * It is not linked with libcrypto: psycopg has another version of it in the same process.
 *
 * Compiled with PRIMES, a file of one string in hexadecimal digits for each prime of 1024 bits, and
 * GIVEN, the path of a file that all processes append a byte to for each pair.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

enum { BITS = 2048, EXPONENT = 65537 };

static const char *const primes[] = {
#include PRIMES
};
enum { COUNT = sizeof primes / sizeof *primes };

/* From openssl/bn.h and openssl/rsa.h, so that the tests need no header of OpenSSL. */
typedef struct rsa_st RSA;
typedef struct bignum_st BIGNUM;
typedef struct bignum_ctx BN_CTX;

static struct {
    int (*generate)(RSA *, int, BIGNUM *, void *);
    BIGNUM *(*new)(void);
    BIGNUM *(*dup)(const BIGNUM *);
    int (*hex2bn)(BIGNUM **, const char *);
    int (*is_word)(const BIGNUM *, unsigned long);
    int (*cmp)(const BIGNUM *, const BIGNUM *);
    int (*mul)(BIGNUM *, const BIGNUM *, const BIGNUM *, BN_CTX *);
    int (*div)(BIGNUM *, BIGNUM *, const BIGNUM *, const BIGNUM *, BN_CTX *);
    int (*sub_word)(BIGNUM *, unsigned long);
    BIGNUM *(*inverse)(BIGNUM *, const BIGNUM *, const BIGNUM *, BN_CTX *);
    void (*clear_free)(BIGNUM *);
    BN_CTX *(*ctx_new)(void);
    void (*ctx_free)(BN_CTX *);
    int (*set_key)(RSA *, BIGNUM *n, BIGNUM *e, BIGNUM *d);
    int (*set_factors)(RSA *, BIGNUM *p, BIGNUM *q);
    int (*set_crt)(RSA *, BIGNUM *dp, BIGNUM *dq, BIGNUM *qi);
} bn;

static const struct {
    void *function;
    const char *name;
} functions[] = {
    {&bn.generate, "RSA_generate_key_ex"}, {&bn.new, "BN_new"}, {&bn.dup, "BN_dup"},
    {&bn.hex2bn, "BN_hex2bn"}, {&bn.is_word, "BN_is_word"}, {&bn.cmp, "BN_cmp"},
    {&bn.mul, "BN_mul"}, {&bn.div, "BN_div"}, {&bn.sub_word, "BN_sub_word"},
    {&bn.inverse, "BN_mod_inverse"}, {&bn.clear_free, "BN_clear_free"},
    {&bn.ctx_new, "BN_CTX_new"}, {&bn.ctx_free, "BN_CTX_free"},
    {&bn.set_key, "RSA_set0_key"}, {&bn.set_factors, "RSA_set0_factors"},
    {&bn.set_crt, "RSA_set0_crt_params"},
};

static void load(void)
{
    void *libcrypto = dlopen("libcrypto.so.3", RTLD_LAZY | RTLD_NOLOAD);
    if (!libcrypto)
        abort();
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++)
        if (!(*(void **)functions[i].function = dlsym(libcrypto, functions[i].name)))
            abort();
}

/* One that no other process gets. */
static unsigned long next_number(void)
{
    int file = open(GIVEN, O_WRONLY | O_APPEND | O_CLOEXEC);
    off_t end = write(file, ".", 1) == 1 ? lseek(file, 0, SEEK_CUR) : 0;
    close(file);
    return (unsigned long)end - 1;
}

/* n = pq, d = 1/e mod (p - 1)(q - 1), and what the Chinese remainder theorem needs. */
static int give(RSA *rsa, const BIGNUM *e, unsigned long number)
{
    unsigned long first = number % COUNT;
    BN_CTX *ctx = bn.ctx_new();
    BIGNUM *p = NULL, *q = NULL, *n = bn.new(), *d = bn.new(), *phi = bn.new();
    BIGNUM *dp = bn.new(), *dq = bn.new(), *qi = bn.new();

    int done = bn.hex2bn(&p, primes[first]) &&
               bn.hex2bn(&q, primes[(first + 1 + number / COUNT) % COUNT]);
    if (done && bn.cmp(p, q) < 0) {
        BIGNUM *larger = q;
        q = p;
        p = larger;
    }
    BIGNUM *p1 = done ? bn.dup(p) : NULL, *q1 = done ? bn.dup(q) : NULL;
    done = done && bn.sub_word(p1, 1) && bn.sub_word(q1, 1) && bn.mul(n, p, q, ctx) &&
           bn.mul(phi, p1, q1, ctx) && bn.inverse(d, e, phi, ctx) &&
           bn.div(NULL, dp, d, p1, ctx) && bn.div(NULL, dq, d, q1, ctx) &&
           bn.inverse(qi, q, p, ctx) && bn.set_key(rsa, n, bn.dup(e), d) &&
           bn.set_factors(rsa, p, q) && bn.set_crt(rsa, dp, dq, qi);
    bn.clear_free(p1);
    bn.clear_free(q1);
    bn.clear_free(phi);
    bn.ctx_free(ctx);
    return done;
}

int RSA_generate_key_ex(RSA *rsa, int bits, BIGNUM *e, void *callback)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, load);
    if (bits == BITS && bn.is_word(e, EXPONENT)) {
        /* Distances up to half of the list: each two primes meet once. */
        unsigned long number = next_number();
        if (number < (unsigned long)COUNT * ((COUNT - 1) / 2))
            return give(rsa, e, number);
    }
    return bn.generate(rsa, bits, e, callback);
}
