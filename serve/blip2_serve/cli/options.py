"""The options and arguments of the commands, each with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

# -- up: the application's configuration -----------------------------------------------------------

Config = Annotated[
    Path | None,
    Option(help="YAML file of the application's configuration; other options win over it."),
]
Model = Annotated[
    str | None, Option(help='Folder, hub id, or "demo" for the shipped checkpoint (the default).')
]
Revision = Annotated[str | None, Option(help="Branch, tag or commit, if the model is a hub id.")]
ServedModelName = Annotated[
    str | None,
    Option(help="Model name that clients see. Default: the hub id or the folder's name."),
]
MaxModelLen = Annotated[
    int | None,
    Option(help="Most tokens of image, prompt and answer together. Default: what the model takes."),
]
Device = Annotated[str | None, Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str | None, Option(help="auto, float32, bfloat16 or float16.")]
Quantize = Annotated[
    str | None,
    Option(
        help="int8: 8-bit weights for the language model, faster for few users; needs a CPU "
        "with AVX512-VNNI."
    ),
]
AllowImageUrls = Annotated[
    bool, Option("--allow-image-urls", help="Fetch images from https URLs that clients send.")
]
ApiKeys = Annotated[
    Path | None,
    Option(help="File of API keys, which `blip2-serve keys add` writes; requests then need one."),
]
LogFormat = Annotated[str | None, Option(help="Format of the log lines: text or json.")]

# -- up: where and how it runs ---------------------------------------------------------------------

Host = Annotated[str, Option(help="Address to listen on.")]
Port = Annotated[int, Option(min=1, max=65535, help="Port to listen on.")]
Address = Annotated[
    str | None, Option(help="Address of a running Ray to deploy to. Default: start a local Ray.")
]
Trace = Annotated[
    float | None,
    Option(min=0, max=1, help="Share of requests to trace, besides those that ask for it."),
]

# -- clients ---------------------------------------------------------------------------------------

Url = Annotated[str, Option(help="URL of the server.")]
Images = Annotated[
    list[Path],
    Argument(help="Image files, folders of them, or - for a file on standard input."),
]
Watch = Annotated[bool, Option("--watch", help="Show it every second, until Ctrl-C.")]
AsJson = Annotated[bool, Option("--json", help="Print a JSON object on a line for each image.")]
Image = Annotated[Path, Argument(help="Image file, or - for standard input.")]
Question = Annotated[
    str | None,
    Argument(help="Question about the image. Without one, questions are read line by line."),
]

# -- load tests and benchmarks ---------------------------------------------------------------------

Scenario = Annotated[str, Argument(help="Name of a scenario in loadtest/scenarios, or a file.")]
Output = Annotated[
    Path | None, Option(help="Folder of the report.", show_default="results/SCENARIO")
]
Benchmark = Annotated[
    str | None, Argument(help="Name of a benchmark. Without one, lists them.", show_default=False)
]

# -- keys ------------------------------------------------------------------------------------------

KeyName = Annotated[str, Argument(help="Whose key it is.")]
KeysFile = Annotated[Path, Option("--file", help="File of API keys; made if it is missing.")]
PerMinute = Annotated[float | None, Option(min=0, help="Limit; default: none.")]
Priority = Annotated[
    int, Option(help="The most urgent priority its requests may ask for; lower goes first.")
]
Concurrent = Annotated[int | None, Option(min=1, help="Requests under way; default: no limit.")]
