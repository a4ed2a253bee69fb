"""``trimtab eval``: put a model through the panel."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from trimtab.cli.options import (
    JudgeKey,
    JudgeModel,
    JudgeName,
    JudgeUrl,
    LeaveReasoning,
    RunCode,
    judge_config,
    listed,
    print_figures,
)
from trimtab.errors import UserError


def register(app: typer.Typer) -> None:
    @app.command("eval")
    def evaluate_model(
        model: Annotated[
            str,
            typer.Argument(
                metavar="MODEL",
                help="A bundle, a model directory, a Hub id, smollm2-135m-instruct, r1-stand-in, or (with --url) a name at an "
                "endpoint.",
            ),
        ],
        panel: Annotated[
            list[str] | None,
            typer.Option(
                metavar="NAMES", help="Tasks and groups, such as safety,overrefusal,gsm8k; see `trimtab tasks`."
            ),
        ] = None,
        modes: Annotated[
            list[str] | None,
            typer.Option(metavar="NAMES", help="Modes to ask in, none for no token; the served one if not given."),
        ] = None,
        attacks: Annotated[
            list[str] | None,
            typer.Option(
                metavar="NAMES", help="Attacks on the harmful prompts, such as roleplay,prefill:5; docs/attacks.md."
            ),
        ] = None,
        limit: Annotated[int | None, typer.Option(help="Prompts per task, chosen by seed.")] = None,
        samples: Annotated[int | None, typer.Option(help="Answers per prompt; more than one are sampled.")] = None,
        temperature: Annotated[
            float | None, typer.Option(help="0 is greedy, the default; 1 where --samples asks for several.")
        ] = None,
        max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens (256).")] = None,
        batch: Annotated[int | None, typer.Option(help="Answers decoded side by side (32).")] = None,
        system: Annotated[str | None, typer.Option(help="System prompt before every prompt that has none.")] = None,
        seed: Annotated[int | None, typer.Option(help="Seed of answers and of attacks (0).")] = None,
        judge: JudgeName = None,
        judge_url: JudgeUrl = None,
        judge_model: JudgeModel = None,
        judge_key_env: JudgeKey = None,
        run_code: RunCode = False,
        leave_reasoning_out: LeaveReasoning = False,
        config: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Settings of the evaluation (.yaml); options change them.")
        ] = None,
        set_: Annotated[
            list[str] | None,
            typer.Option("--set", metavar="PATH=VALUE", help="Change a setting, such as sampling.top_p=0.9."),
        ] = None,
        url: Annotated[
            str | None, typer.Option(metavar="URL", help="Ask MODEL at this OpenAI-compatible address, ending in /v1.")
        ] = None,
        key_env: Annotated[
            str | None, typer.Option(metavar="VARIABLE", help="Environment variable that holds the endpoint's key.")
        ] = None,
        timeout: Annotated[float | None, typer.Option(help="Seconds for one call of the endpoint (60).")] = None,
        concurrency: Annotated[int | None, typer.Option(help="Calls of the endpoint open at once (8).")] = None,
        endpoint_prefill: Annotated[
            bool,
            typer.Option(help="The endpoint continues a last assistant message (vLLM does): allows prefill attacks."),
        ] = False,
        engine: Annotated[
            Literal["transformers", "vllm"], typer.Option(help="What generates; vllm must be installed.")
        ] = "transformers",
        revision: Annotated[str | None, typer.Option(help="Hub commit or tag of MODEL.")] = None,
        out: Annotated[
            Path | None, typer.Option(metavar="DIR", help="Where the files go; runs/eval/<model>-<hash> if not given.")
        ] = None,
    ) -> None:
        """Put a model through the panel: prompts, attacks, answers, verdicts, figures. The same command goes on where it
        stopped. Prints the figures and the path of the report."""
        from trimtab.evaluate.run import EvalConfig, TooManyUnscored, evaluate
        from trimtab.machine import quieten
        from trimtab.progress import make_reporter
        from trimtab.report.evaluation import report_evaluations
        from trimtab.seeds import digest
        from trimtab.settings import load_settings

        started = time.monotonic()
        given: dict[str, Any] = {
            "panel": listed(panel) or None, "modes": listed(modes) or None, "attacks": listed(attacks) or None,
            "limit": limit, "system": system, "seed": seed, "sampling.samples": samples,
            "sampling.temperature": 1.0 if temperature is None and (samples or 1) > 1 and config is None else temperature,
            "sampling.max_new_tokens": max_new_tokens, "sampling.batch": batch,
        }  # fmt: skip
        settings = [f"{key}={_yaml(value)}" for key, value in given.items() if value is not None]
        wanted = load_settings(config, [*_defaults(config), *settings, *(set_ or ())], EvalConfig, "evaluation")
        chosen = judge_config(judge, judge_url, judge_model, judge_key_env, run_code, leave_reasoning_out, wanted.judge)
        wanted = wanted.model_copy(update={"judge": chosen})
        endpoint = {"key_env": key_env, "timeout": timeout, "concurrency": concurrency}
        if url is None and (endpoint_prefill or any(value is not None for value in endpoint.values())):
            raise UserError(
                "--key-env, --timeout, --concurrency and --endpoint-prefill are for an endpoint; give its address with --url"
            )
        quieten()
        target = _target(model, revision, url, endpoint, endpoint_prefill, engine)
        if out is None:
            out = (
                Path("runs/eval") / f"{target.name.replace('/', '--')}-{digest([target.identity, wanted.asking()])[:8]}"
            )
        reporter = make_reporter()
        failed: TooManyUnscored | None = None
        try:
            evaluate(target, wanted, out, reporter)
        except TooManyUnscored as error:  # what there is can be read all the same
            failed = error
        finally:
            reporter.close()
            target.close()
        print_figures(out)
        page = report_evaluations([out], out)
        print(f"done in {time.monotonic() - started:.0f} s; read the answers with: trimtab view {out}")
        print(page)
        if failed is not None:
            raise failed


def _target(
    model: str, revision: str | None, url: str | None, endpoint: dict[str, Any], prefill: bool, engine: Any
) -> Any:
    from pydantic import ValidationError

    from trimtab.endpoint import EndpointConfig
    from trimtab.evaluate.remote import EndpointTarget
    from trimtab.evaluate.targets import open_local
    from trimtab.models.config import LoadConfig
    from trimtab.settings import explain

    if url is None:
        return open_local(LoadConfig(load=model, revision=revision), engine)
    if revision is not None or engine != "transformers":
        raise UserError("--revision and --engine are for a model that is opened here, not for an endpoint (--url)")
    raw = {"url": url, "model": model, **{key: value for key, value in endpoint.items() if value is not None}}
    try:
        return EndpointTarget(EndpointConfig.model_validate(raw), prefill=prefill)
    except ValidationError as error:
        raise UserError(f"--url: {explain(error, raw, EndpointConfig)}") from None


def _defaults(config: Path | None) -> list[str]:
    """Where no file is given, sampling starts from the evaluation's own defaults, so that one field can be changed."""
    from trimtab.evaluate.run import EvalConfig

    if config is not None:
        return []
    sampling = EvalConfig().sampling
    return [f"sampling={_yaml(sampling.plain())}"]


def _yaml(value: Any) -> str:
    import yaml

    # Not JSON: its escapes of what lies beyond the basic plane are two halves to YAML.
    return str(yaml.safe_dump(value, default_flow_style=True, width=2**30))
