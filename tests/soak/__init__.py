"""A soak: many threads issue, import and use keys while the HSM fails at random under them.

``scripts/soak --seconds N --seed S`` runs it on a private SoftHSM token behind the fault shim,
with two backends in one process: one keeps imported keys as sealed blobs, the other one keeps
everything in the HSM token. What has to hold:

* no wrong answer; a valid call ends well, or in an error that says 'try later' or names a CKR;
* what was acknowledged is there at the end and is the right key;
* at rest the HSM token has no session objects, no more sessions than the pools', and exactly the
  token objects that were acknowledged; after closing, nothing;
* no thread stops for long; after the last fault the speed is what it was before the first;
* the module is never misused (a session in two threads, C_Finalize under a call).

``runner`` runs a load in phases, ``load`` has the operations and the threads, ``faults`` the
fault schedule, ``__main__`` the command.
"""
