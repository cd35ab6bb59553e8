import json

import numpy as np
import pytest


@pytest.mark.parametrize("method", ["hutch++", "hutchinson", "xtrace"])
@pytest.mark.parametrize("options", ["", " --max-matvecs 5 --seed 2", " --rtol 0.5"])
def test_is_near_that_of_the_matrix(run, checkpoint, method, options):
    run(f"index --model {checkpoint} --exact --json index.json")
    outcome = run(f"trace --model {checkpoint} --method {method}{options} --json trace.json")
    assert (outcome.code or 0, outcome.err) == (0, "")
    with open("index.json") as file:
        values = np.array(json.load(file)["eigenvalues"])
    with open("trace.json") as file:
        content = json.load(file)
    assert (content["format"], content["version"]) == ("hvpspec-trace", 1)
    assert content["method"] == method
    for name, true in (("trace", values.sum()), ("frobenius_norm", np.linalg.norm(values))):
        found = content[name]
        assert set(found) == {"value", "sem", "num_matvecs"}
        assert found["value"] == pytest.approx(true, abs=20 * found["sem"] + 1e-5)
        assert found["num_matvecs"] > 0
    for text in ("trace", "‖H‖_F", "products"):
        assert text in outcome.out
    if options == "":
        assert outcome.out.count("exact, by 6 products") == 2


def test_target_is_checked_before_the_work(run, workspace):
    outcome = run("trace --model nothing.pt --json missing/t.json")
    assert outcome.code == 2
    assert "cannot write" in outcome.err
