"""What a shell completes after `proxstep`: commands, options, a recipe's keys, our recipes."""

from __future__ import annotations

from proxstep.cli.arguments import SHELLS, TAKES_KEYS, Parser, make_parser
from proxstep.config.names import described_keys, task_names
from proxstep.config.reading import recipe_names

_SCRIPT = """\
_proxstep() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" words
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="{commands}"
  else
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _proxstep proxstep"""


def completion_script(shell: str) -> str:
    """Return the script of a shell: `eval "$(proxstep completion bash)"` in its start-up file.

    zsh runs the same through its own bashcompinit.
    """
    parser = make_parser()
    cases = [
        f'      {name}) words="{" ".join(_words(name, command))}" ;;'
        for name, command in parser.commands.items()
    ]
    script = _SCRIPT.format(commands=" ".join(parser.commands), cases="\n".join(cases))
    before = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"
    return (before if shell == "zsh" else "") + script


def _words(name: str, command: Parser) -> list[str]:
    """Return what can follow a command."""
    words = [*command.takes_value, *command.commands]
    if name in TAKES_KEYS:
        keys = (key.partition(" ")[0] for key, _, _, _ in described_keys())
        words += [*recipe_names(), *dict.fromkeys(f"--{key}" for key in keys)]
    if name == "init":
        words += task_names()
    if name == "completion":
        words += SHELLS
    return words
