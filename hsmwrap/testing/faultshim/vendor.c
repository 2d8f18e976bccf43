/* The vendors that can be played, and the order of the layers.
 *
 * To add mechanisms: a file of their own with a function like sm2_call, their numbers in struct
 * vendor, and a line in vendor_call: the layer of SM2 gets a function that calls the new layer, and
 * the new layer gets the real module. A layer calls the next one for what it does not do itself, and
 * for the objects that it makes: what unwraps SM2 ciphertexts calls C_CreateObject of the layers
 * below, so a key type that a layer below knows can be unwrapped into. What a layer needs of
 * libcrypto is a line in libcrypto.h; what it keeps in memory is dropped after a fork, in
 * vendor_after_fork_in_child.
 */
#include "vendor.h"

#include <string.h>

#include "libcrypto.h"

#define ARITY(name, arity, kind) arity,
static const unsigned char arity[FUNCTION_COUNT] = {FUNCTIONS(ARITY)};

/* The numbers are those of the profiles in hsmwrap/pkcs11/binding/vendors, and collide as they do;
 * what the vendors' own HSMs do beyond their numbers is not known here. Sansec publishes a key type
 * of SM4; the numbers of its modes here are made up. So are those of key wrap: none is published. */
static const struct vendor vendors[VENDOR_COUNT] = {
    [VENDOR_SANSEC] = {
        .sm2_key_type = 0x80000004,
        .sm2_generate = 0x80008001,
        .sm2_decrypt = {{0x80008200, SM2_C1C3C2}, {0x80008201, SM2_DER}},
        .sm4_key_type = 0x80000106,
        .sm4_generate = 0x8000A001,
        .sm4_ecb = 0x8000A100,
        .sm4_cbc = 0x8000A200,
        .sm4_ctr = 0x8000A300,
        .sm4_gcm = 0x8000A400,
        .sm4_wrap = 0x8000A500,
    },
    [VENDOR_TASS] = {
        .sm2_key_type = 0x80000004,
        .sm2_generate = 0x80008001,
        .sm2_decrypt = {{0x80008200, SM2_C1C2C3}},
        .sm4_key_type = 0x80000002,
        .sm4_generate = 0x80000107,
        .sm4_ecb = 0x80000108,
        .sm4_cbc = 0x80000109,
        .sm4_wrap = 0x80000120,
    },
    [VENDOR_REMOTE] = {
        /* Of no vendor: CKM_KEA_KEY_PAIR_GEN and CKM_JUNIPER_WRAP, as p11-kit's client carries none
         * of a vendor's mechanisms to a module in another process. */
        .sm2_key_type = 0x80000004,
        .sm2_generate = 0x1010,
        .sm2_decrypt = {{0x1065, SM2_C1C3C2}},
    },
};

/* What the layer of SM4 is called with, by the layer of SM2. */
static _Thread_local struct layer {
    const struct vendor *vendor;
    forward call;
} below;

static CK_RV call_sm4(enum function_id id, const word a[])
{
    return sm4_call(below.vendor, id, a, below.call);
}

CK_RV vendor_call(struct control *control, enum function_id id, const word a[], forward real)
{
    uint64_t played = atomic_load(&control->vendor);
    if (played == VENDOR_NONE)
        return real(id, a);
    if (played >= VENDOR_COUNT || !libcrypto())
        return CKR_FUNCTION_FAILED;
    below = (struct layer){&vendors[played], real};
    return sm2_call(&vendors[played], id, a, call_sm4);
}

void vendor_after_fork_in_child(void)
{
    sm2_after_fork_in_child();
    sm4_after_fork_in_child();
}

void copy_arguments(enum function_id id, const word from[], word to[ARGUMENTS_MAX])
{
    memset(to, 0, ARGUMENTS_MAX * sizeof *to);
    memcpy(to, from, arity[id] * sizeof *to);
}
