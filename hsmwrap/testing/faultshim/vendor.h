/* An HSM whose vendor has SM2 of its own, played in front of the real module.
 *
 * A layer sees the calls and performs them, or changes them and hands them on. Numbers and layouts
 * of a vendor are data in vendor.c.
 */
#ifndef HSMWRAP_VENDOR_H
#define HSMWRAP_VENDOR_H

#include "control.h"
#include "cryptoki.h"

enum sm2_layout { SM2_C1C3C2, SM2_C1C2C3, SM2_DER };

/* Values of control->vendor, as in hsmwrap/testing/faults.py. */
enum { VENDOR_NONE, VENDOR_SANSEC, VENDOR_TASS, VENDOR_REMOTE, VENDOR_COUNT };

struct vendor {
    CK_ULONG sm2_key_type, sm2_generate;
    /* Mechanisms of C_Decrypt and C_UnwrapKey, and what they take; 0: the vendor has no second. */
    struct {
        CK_ULONG mechanism;
        enum sm2_layout layout;
    } sm2_decrypt[2];
    /* 0: the vendor does not have the mode. */
    CK_ULONG sm4_key_type, sm4_generate, sm4_ecb, sm4_cbc, sm4_ctr, sm4_gcm, sm4_wrap;
};

/* Performs a call as the vendor's module that is played does; itself where none is. */
CK_RV vendor_call(struct control *control, enum function_id id, const word a[], forward real);

enum { ARGUMENTS_MAX = 8 };

/* A call's arguments, and zeros where it has fewer: a layer may look at each of them. */
void copy_arguments(enum function_id id, const word from[], word to[ARGUMENTS_MAX]);

CK_RV sm2_call(const struct vendor *vendor, enum function_id id, const word a[], forward call);

CK_RV sm4_call(const struct vendor *vendor, enum function_id id, const word a[], forward call);

void vendor_after_fork_in_child(void);
void sm2_after_fork_in_child(void);
void sm4_after_fork_in_child(void);

#endif
