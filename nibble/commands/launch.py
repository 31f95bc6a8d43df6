"""`nibble launch`: a run on a cluster, in a cloud or on other hosts; one file and its command."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from nibble.commands import progress


def launch(
    recipe: Annotated[Path | None, typer.Argument(help="YAML file; flags override it.")] = None,
    on: Annotated[str, typer.Option(help="slurm, k8s, sky or ssh.")] = "",
    model: Annotated[str, typer.Option(help="Hub id or local folder.")] = "",
    data: Annotated[list[str] | None, typer.Option(help="Training examples.")] = None,
    eval_data: Annotated[str, typer.Option(help="Held-out examples, or a fraction.")] = "",
    method: Annotated[str, typer.Option(help="lora, qlora, full or auto.")] = "",
    out: Annotated[str, typer.Option(help="Folder of the run, on the machines.")] = "",
    set_: Annotated[list[str] | None, typer.Option("--set", help="section.key=value")] = None,
    anyway: Annotated[bool, typer.Option(help="Start even if the plan says no.")] = False,
    nodes: Annotated[int | None, typer.Option(help="Machines; 1.")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs on each machine.")] = None,
    device: Annotated[
        str, typer.Option(help="Kind of GPU; the plan says how many. sky: its name there.")
    ] = "",
    cpus: Annotated[int | None, typer.Option(help="Cores on each machine.")] = None,
    memory: Annotated[str, typer.Option(help="Host memory of each machine: 64GiB.")] = "",
    time: Annotated[str, typer.Option(help="Limit, such as 8h: of an attempt; k8s: in all.")] = "",
    image: Annotated[str, typer.Option(help="Container image that has nibble.")] = "",
    storage: Annotated[str, typer.Option(help="Claim (k8s), volume or bucket (sky).")] = "",
    host: Annotated[list[str] | None, typer.Option(help="ssh: a machine; again for more.")] = None,
    port: Annotated[int | None, typer.Option(help="ssh: where the machines meet; 29500.")] = None,
    workdir: Annotated[str, typer.Option(help="Where relative paths start there.")] = "",
    python: Annotated[str, typer.Option(help="Python that has nibble, there.")] = "",
    to: Annotated[Path | None, typer.Option(help="File to write; named after the job.")] = None,
    submit: Annotated[bool, typer.Option(help="Also run the command.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write the file that runs a recipe on other machines, and print the command that starts it.

    The printed command once more goes on with the run. Nothing is started without --submit.
    """
    from nibble.config import check_run, load_config

    flags = {"model.name": model, "data.eval": eval_data, "method": method, "out": out}
    run = load_config(recipe, [*progress.overrides(flags, data), *(set_ or [])])
    check_run(run)
    from nibble.experiment.launch.job import Options
    from nibble.experiment.launch.target import write_launch

    options = Options(
        nodes=nodes,
        gpus=gpus,
        cpus=cpus,
        device=device,
        memory=memory,
        time=time,
        image=image,
        storage=storage,
        hosts=tuple(host or ()),
        workdir=workdir,
        python=python,
        port=port,
    )
    with progress.working("planning"):
        made = write_launch(run, on, options, to=to, anyway=anyway)
    if as_json:
        typer.echo(progress.to_json({"file": str(made.file), "commands": made.commands}))
    else:
        typer.echo(f"wrote {made.file}", err=True)
        typer.echo(" && ".join(shlex.join(command) for command in made.commands))
    if submit:
        _submit(made.commands, is_quiet=as_json)


def _submit(commands: list[list[str]], *, is_quiet: bool) -> None:
    """Run the commands in order; the first that fails ends this one with its exit code.

    The last one takes the place of this process, so that signals are its own. Where it is quiet
    they say on stderr what they have to say.
    """
    from nibble.errors import UnavailableError

    *first, last = commands
    if shutil.which(last[0]) is None:
        raise UnavailableError(
            f"{last[0]} is not on this machine", fix="run the printed command where it is"
        )
    sys.stdout.flush()
    for command in first:
        code = subprocess.run(command, stdout=2 if is_quiet else None).returncode
        if code:
            raise typer.Exit(code if code > 0 else 1)
    if is_quiet:
        os.dup2(2, 1)
    # Python ignores it; what is started here is not to.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.execvp(last[0], last)
