from hsmwrap.cli import main

KEYS = {
    "managed_hsm",
    "dedicated",
    "wrapping_key_spec",
    "wrapping_algorithm",
    "protection_level",
    "allowed",
    "rule",
    "code",
    "parameter",
    "reason",
}


def allowed(document):
    return {
        (row["wrapping_key_spec"], row["wrapping_algorithm"], row["protection_level"])
        for row in document["rows"]
        if row["allowed"]
    }


def deployments(document):
    return {(row["managed_hsm"], row["dedicated"]) for row in document["rows"]}


def test_json_without_options_has_every_combination_of_every_deployment(run_json):
    status, document = run_json("compat")
    assert status == 0
    assert len(document["rows"]) == 96
    assert len({tuple(row.values())[:5] for row in document["rows"]}) == 96
    assert sum(row["allowed"] for row in document["rows"]) == 27
    assert all(row.keys() == KEYS for row in document["rows"])


def test_json_gives_rule_code_parameter_and_reason_of_refusals_only(run_json):
    _, document = run_json("compat")
    for row in document["rows"]:
        why = [row[key] for key in ("rule", "code", "parameter", "reason")]
        assert why == [None] * 4 if row["allowed"] else all(why)


def test_a_region_is_one_deployment(run_json):
    _, document = run_json("compat", "--region", "cn-hangzhou")
    assert deployments(document) == {("SCA", False)}
    assert ("EC_SM2", "SM2PKE", "HSM") in allowed(document)


def test_an_unlisted_region_has_no_managed_hsm(run_json):
    _, document = run_json("compat", "--region", "eu-central-1")
    assert deployments(document) == {("NONE", False)}
    assert {level for _, _, level in allowed(document)} == {"SOFTWARE"}


def test_a_class_and_dedicated(run_json):
    _, document = run_json("compat", "--managed-hsm", "fips", "--dedicated")
    assert deployments(document) == {("FIPS", True)}
    assert {algorithm for _, algorithm, _ in allowed(document)} == {
        "RSAES_PKCS1_V1_5",
        "RSAES_OAEP_SHA_256",
    }


def test_dedicated_alone_is_every_dedicated_deployment(run_json):
    _, document = run_json("compat", "--dedicated")
    assert deployments(document) == {("SCA", True), ("FIPS", True), ("NONE", True)}


def test_the_table_names_verdict_rule_and_reason(capsys):
    assert main(["compat", "--managed-hsm", "FIPS"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "shared KMS, managed HSM of class FIPS"
    assert len(lines) == 4 + 16
    assert lines[-1].split()[:5] == ["EC_SM2", "SM2PKE", "HSM", "refused", "hsm-certification"]
    assert lines[-1].endswith("EC_SM2 needs a managed HSM of class SCA; this region's is FIPS")
    assert lines[4].split() == ["RSA_2048", "RSAES_PKCS1_V1_5", "SOFTWARE", "allowed", "-", "-"]


def test_the_table_is_aligned(capsys):
    main(["compat", "--managed-hsm", "NONE"])
    lines = capsys.readouterr().out.splitlines()[2:]
    for heading in ("wrapping algorithm", "level", "verdict", "rule", "reason"):
        start = lines[0].index(heading)
        assert all(line[start - 2 : start] == "  " and line[start] != " " for line in lines)


def test_the_table_without_options_has_six_deployments(capsys):
    assert main(["compat"]) == 0
    out = capsys.readouterr().out
    assert out.count("shared KMS") == out.count("dedicated KMS,") == 3
    assert "no managed HSM\n" in out
