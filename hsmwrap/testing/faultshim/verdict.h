/* Which fault, if any, a call gets. */
#ifndef HSMWRAP_VERDICT_H
#define HSMWRAP_VERDICT_H

#include <stdbool.h>

#include "control.h"
#include "cryptoki.h"

struct verdict {
    CK_RV code; /* CKR_OK: no fault */
    bool after; /* perform the call first and lose its answer */
};

/* call: ordinal of this call to function id, from 1, as counted in the control file. */
struct verdict verdict_of(struct control *control, enum function_id id, uint64_t call);

#endif
