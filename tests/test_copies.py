"""The scripts repeat what they share, word for word; this keeps the copies equal."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {path.name: path.read_text() for path in sorted(ROOT.glob("*.py"))}

# Names that may differ between scripts, and why.
OWN = {
    "Args": "each script has its own flags; those of the same name are compared one by one below",
    "main": "each script has its own loop",
    "report": "stages 1 and 2 report other figures",
}
# Flags whose default may differ between scripts, and why.
OWN_DEFAULTS = {
    "context": "stage 1 has two models that see k frames before o_t, ILPO has one",
    "grad_steps": "the paper's A.4 gives each stage its own",
    "lr": "ILPO's stays as it is (Edwards et al.), that of stages 1 and 2 rises and falls",
    "max_grad_norm": "PPO clips at 0.5 (Cobbe et al.), stage 1 at 2 (official code)",
    "warmup_steps": "the official code warms up each stage in its own way",
}


def definitions(source):
    """{name: ast.dump} of the functions and classes at the top of a script."""
    return {node.name: ast.dump(node) for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def flags(source):
    """{flag: (type, default, help)} of a script's Args."""
    (args,) = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    found = {}
    for field, text in zip(args.body, args.body[1:]):
        if isinstance(field, ast.AnnAssign):
            found[field.target.id] = (ast.unparse(field.annotation), ast.unparse(field.value), text.value.value)
    return found


def differences(scripts, parse, allowed):
    """Names whose copies differ, as '<name>: <script> and <script>'."""
    seen, wrong = {}, []
    for script, source in scripts.items():
        for name, content in parse(source).items():
            other, copy = seen.setdefault(name, (script, content))
            if copy != content and name not in allowed:
                wrong.append(f"{name}: {other} and {script}")
    return wrong


def test_networks_and_functions_are_the_same_in_every_script():
    assert differences(SCRIPTS, definitions, OWN) == []


def test_flags_have_the_same_default_and_help_in_every_script():
    assert differences(SCRIPTS, flags, OWN_DEFAULTS) == []


def test_every_flag_has_a_help_text():
    for script, source in SCRIPTS.items():
        for flag, (_, _, text) in flags(source).items():
            assert isinstance(text, str) and text.strip(), f"{script}: {flag}"


def test_exceptions_are_needed():
    assert {line.split(":")[0] for line in differences(SCRIPTS, definitions, ())} == set(OWN)
    assert {line.split(":")[0] for line in differences(SCRIPTS, flags, ())} == set(OWN_DEFAULTS)


def test_the_check_finds_what_differs():
    one = 'class Args:\n    lr: float = 1.0\n    """Rate."""\n\ndef f(x):\n    return x + 1\n'
    assert differences({"a": one, "b": one}, definitions, ()) == [] == differences({"a": one, "b": one}, flags, ())
    assert differences({"a": one, "b": one.replace("+ 1", "+ 2")}, definitions, ()) == ["f: a and b"]
    assert differences({"a": one, "b": one.replace("1.0", "2.0")}, flags, ()) == ["lr: a and b"]
    assert differences({"a": one, "b": one.replace("Rate.", "Speed.")}, flags, ()) == ["lr: a and b"]
    assert differences({"a": one, "b": one.replace("  # why", "")}, definitions, ()) == []
