// The SDK for Node.js, unmodified: the calls of its user, and the answers as one line of JSON.
const { default: Kms, ...models } = require("@alicloud/kms20160120");

async function main(endpoint, keyId) {
  const kms = new Kms({
    accessKeyId: "testid",
    accessKeySecret: "testsecret",
    regionId: "cn-hangzhou",
    endpoint,
    protocol: "HTTPS",
  });
  const call = (action, fields = {}) => {
    const method = action[0].toLowerCase() + action.slice(1);
    return kms[method](new models[`${action}Request`](fields), {});
  };
  const answers = {};
  await call("CreateAlias", { keyId, aliasName: "alias/node" });
  answers.described = (await call("DescribeKey", { keyId: "alias/node" })).keyMetadata.keyId;
  const made = await call("GenerateDataKey", { keyId: "alias/node", keySpec: "AES_256" });
  const hidden = await call("GenerateDataKeyWithoutPlaintext", { keyId, numberOfBytes: 16 });
  const opened = await call("Decrypt", { ciphertextBlob: made.ciphertextBlob });
  answers.same = opened.plaintext === made.plaintext;
  answers.hidden = Buffer.from(
    (await call("Decrypt", { ciphertextBlob: hidden.ciphertextBlob })).plaintext,
    "base64",
  ).length;
  answers.versions = (await call("ListKeyVersions", { keyId })).totalCount;
  const listed = await call("ListAliasesByKeyId", { keyId });
  answers.aliases = listed.aliases.alias.map((each) => each.aliasName);
  await call("UpdateKeyDescription", { keyId, description: "by node" });
  answers.description = (await call("DescribeKey", { keyId })).keyMetadata.description;
  await call("DeleteAlias", { aliasName: "alias/node" });
  try {
    await call("DescribeKey", { keyId: "alias/node" });
  } catch (error) {
    answers.code = error.code;
  }
  console.log(JSON.stringify(answers));
}

main(...process.argv.slice(2)).catch((error) => {
  console.error(error);
  process.exitCode = 1;
});
