/* What the plug-in hsmwrap-sdf calls of the interface of GM/T 0018 (SDF), and nothing more.
 *
 * Declared from the standard's facts: GM/T 0018-2012, and the edition of 2023 where it says that it
 * differs. Numbers of algorithms are those of GM/T 0006. A device's library has more functions, and
 * some vendors' structures differ from the standard's: compare with the vendor's own header.
 */
#ifndef HSMWRAP_SDF_H
#define HSMWRAP_SDF_H

enum { SDF_COORDINATE = 64, SDF_HASH = 32 }; /* an SM2 coordinate fills the last 32 bytes of 64 */

typedef struct {
    unsigned int bits; /* 256 */
    unsigned char x[SDF_COORDINATE], y[SDF_COORDINATE];
} ECCrefPublicKey;

/* C1 = (x, y), C3 = M, C2 = C with L bytes. */
typedef struct {
    unsigned char x[SDF_COORDINATE], y[SDF_COORDINATE];
    unsigned char M[SDF_HASH];
    unsigned int L;
    unsigned char C[];
} ECCCipher;

typedef struct {
    unsigned char IssuerName[40], DeviceName[16], DeviceSerial[16];
    unsigned int DeviceVersion, StandardVersion; /* 2: the edition of 2023 */
    unsigned int AsymAlgAbility[2], SymAlgAbility, HashAlgAbility, BufferSize;
} DEVICEINFO;

#define SGD_SM4_ECB 0x00000401u
#define SGD_SM4_CBC 0x00000402u
#define SGD_SM2_3 0x00020800u /* SM2 public-key encryption */

#define SDR_OK 0x00000000u
#define SDR_NOTSUPPORT 0x01000002u
#define SDR_PARDENY 0x01000007u /* no right to use the private key */
#define SDR_KEYNOTEXIST 0x01000008u
#define SDR_ALGNOTSUPPORT 0x01000009u
#define SDR_SYMOPERR 0x0100000Fu
#define SDR_KEYERR 0x01000015u
#define SDR_ENCDATAERR 0x01000016u /* the ECC ciphertext is wrong */
#define SDR_PRKRERR 0x01000018u    /* the right to use the private key was refused */
#define SDR_NOBUFFER 0x0100001Cu
#define SDR_INARGERR 0x0100001Du

/* Devices, sessions, and the right to use a private key in a session, by a password of 8 or more
 * bytes. */
int SDF_OpenDevice(void **device);
int SDF_CloseDevice(void *device);
int SDF_OpenSession(void *device, void **session);
int SDF_CloseSession(void *session);
int SDF_GetDeviceInfo(void *session, DEVICEINFO *info);
int SDF_GetPrivateKeyAccessRight(void *session, unsigned int index, unsigned char *password,
                                 unsigned int length);
int SDF_ReleasePrivateKeyAccessRight(void *session, unsigned int index);

/* Pairs under an index: made ahead with the device's management tool. Key-encryption keys have
 * indexes of their own. Keys of a session have handles, which die with the session. */
int SDF_ExportEncPublicKey_ECC(void *session, unsigned int index, ECCrefPublicKey *key);
int SDF_ImportKeyWithISK_ECC(void *session, unsigned int index, ECCCipher *key, void **handle);
int SDF_GenerateKeyWithKEK(void *session, unsigned int bits, unsigned int algorithm,
                           unsigned int index, unsigned char *key, unsigned int *length,
                           void **handle);
int SDF_ImportKeyWithKEK(void *session, unsigned int algorithm, unsigned int index,
                         unsigned char *key, unsigned int length, void **handle);
int SDF_DestroyKey(void *session, void *handle);

/* Of the edition of 2012; that of 2023 has left it out. */
int SDF_ExchangeDigitEnvelopeBaseOnECC(void *session, unsigned int index, unsigned int algorithm,
                                       ECCrefPublicKey *to, ECCCipher *in, ECCCipher *out);

int SDF_ExternalEncrypt_ECC(void *session, unsigned int algorithm, ECCrefPublicKey *key,
                            unsigned char *data, unsigned int length, ECCCipher *encrypted);

/* Whole blocks; no padding. iv is read and written. */
int SDF_Encrypt(void *session, void *handle, unsigned int algorithm, unsigned char *iv,
                unsigned char *data, unsigned int length, unsigned char *encrypted,
                unsigned int *encrypted_length);

#endif
