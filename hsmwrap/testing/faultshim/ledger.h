/* This process's sessions and session objects, published as numbers in the control file.
 *
 * Token objects need no table: an object that is destroyed and was not made here as a session
 * object is a token object, since session objects are seen by their own process only.
 */
#ifndef HSMWRAP_LEDGER_H
#define HSMWRAP_LEDGER_H

#include <stdbool.h>
#include <stddef.h>

#include "control.h"
#include "cryptoki.h"

void ledger_open(struct control *control);

void ledger_session_opened(CK_ULONG session, CK_ULONG slot);
void ledger_session_closed(CK_ULONG session);
void ledger_slot_closed(CK_ULONG slot);
void ledger_clear(void);
size_t ledger_sessions(void);
/* Any slot with open sessions; false when no session is open. */
bool ledger_any_slot(CK_ULONG *slot);

void ledger_object_made(CK_ULONG object, CK_ULONG session);
/* Forget a session object; false when it is none. */
bool ledger_object_destroyed(CK_ULONG object);
bool ledger_is_session_object(CK_ULONG object);

/* Around each call with a session handle; enter answers false when another call is inside. */
bool ledger_enter(CK_ULONG session);
void ledger_leave(CK_ULONG session);
/* True when a session of this slot is inside a call. */
bool ledger_slot_busy(CK_ULONG slot);

/* Around fork(), so that the child inherits whole tables and starts with empty ones. */
void ledger_before_fork(void);
void ledger_after_fork_in_parent(void);
void ledger_after_fork_in_child(void);

#endif
