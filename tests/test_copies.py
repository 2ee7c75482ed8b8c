"""The stages' scripts repeat the networks that they share; this keeps the copies equal."""

import ast

from conftest import ROOT

SCRIPTS = {path.name: path.read_text() for path in sorted(ROOT.glob("*.py"))}
BASELINES = {path.name: path.read_text() for path in sorted((ROOT / "baselines").glob("*.py"))}

# Names that differ between scripts, and why.
OWN = {
    "Args": "each script has its own flags; those of one name are compared one by one",
    "main": "each script has its own loop",
    "ppo_update": "the expert sees frames, the online policy features and the decoder's logits",
    "evaluate": "stages 1 and 2 report other metrics; common's plays games",
    "fit_decoder": "offline for a number of updates, online for passes over all transitions",
}
# Flags whose default or help differs between scripts, and why.
OWN_FLAGS = {
    "batch_size": "windows or frames",
    "grad_steps": "each stage has its own (A.4)",
    "lr": "PPO's on the last layers is 0.01 (section 5)",
    "max_grad_norm": "PPO clips at 0.5 (Cobbe et al.), stage 1 at 2 (official code)",
    "rollout_steps": "256 for the expert (Cobbe et al.), 64 online (official code)",
    "entropy_coef": "0.01 for the expert (Cobbe et al.), 0.0025 online (official code)",
    "warmup_steps": "each stage has its own (official code)",
}


def definitions(source):
    """{name: ast.dump} of the functions and classes at the top of a script."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: ast.dump(node) for node in ast.parse(source).body if isinstance(node, kinds)}


def flags(source):
    """{flag: (type, default, help)} of a script's Args, or of common.py's RunArgs."""
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    (args,) = [node for node in classes if node.name in ("Args", "RunArgs")]
    found = {}
    for field, text in zip(args.body, args.body[1:]):
        if isinstance(field, ast.AnnAssign):
            kind = ast.unparse(field.annotation)
            default = field.value and ast.unparse(field.value)
            assert isinstance(text, ast.Expr), f"{field.target.id} has no help text"
            found[field.target.id] = (kind, default, text.value.value)
    return found


def differences(scripts, parse):
    """Names whose copies differ between scripts."""
    seen, wrong = {}, set()
    for source in scripts:
        for name, content in parse(source).items():
            if seen.setdefault(name, content) != content:
                wrong.add(name)
    return wrong


def test_copies_are_equal_and_exceptions_are_needed():
    stages = [source for name, source in SCRIPTS.items() if name != "common.py"]
    assert differences(stages, definitions) == set(OWN)
    assert differences(stages, flags) == set(OWN_FLAGS)
