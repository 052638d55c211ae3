"""What `derta --help` and each command's `--help` say."""

DESCRIPTION = """\
Fine-tune language models so that they can refuse at any point of an answer (DeRTa, arXiv 2407.09121), in JAX.

Start with `derta demo`: it trains and measures the whole method in small, in minutes, without weights or data.
"""

EXIT_CODES = """\
exit codes: 0 done; 1 failed; 2 a mistake in a command, config, data or weights, explained on stderr;
75 stopped early (Ctrl-C, preemption) with everything saved: the same command goes on
"""

MODEL = "a Hugging Face directory, hub id or gs:// URL, a PEFT adapter, or a run directory"

DEMO = """\
Train a tiny language model in an invented world, tune it four ways (vanilla, RecAug, RTO, DeRTa), attack all of them
on objects that no safety data has named, and write a report. About five minutes on two cores.

  derta demo && open demo/report.html
  derta demo --methods vanilla,derta,dpo,derta_plus,security_vectors --seeds 5
"""

PREPARE = """\
Read JSONL, check every line, and write a dataset that training reads. Three kinds of lines, which may be mixed:

  {"id", "prompt", "safe", "harmful", "source"?, "category"?}   a harmful question with both answers
  {"id", "prompt", "response"}                                  a helpful row
  {"prefix", "text", "safe"}                                    a finished row of the DeRTa authors' files

  derta prepare triples.jsonl helpful.jsonl --output data/mine

Public sets become triples, a safe answer beside a harmful one to the same prompt; prompts that the model will be
evaluated with can be refused, or left out, by a list of them or of their hashes. See docs/data.md.

  derta prepare --from circuit-breakers train.json --with helpful.jsonl --refuse evaluation.txt --output data/mine
"""

INSPECT = """\
Show how rows are tokenised under a config: which tokens are prompt, harmful prefix, response and eos, which of them are
learned, and where the refusal token is the label.

  derta inspect configs/tiny.yaml model.path=MODEL data.path=data/mine --rows 2
  derta inspect configs/tiny.yaml model.path=MODEL data.path=data/mine --json | jq .counts
"""

TRAIN = """\
Train as a config says. The run directory gets config.yaml, metrics.jsonl, tensorboard/, checkpoints/ and summary.json.
The same command resumes after a stop, exactly; Ctrl-C and SIGTERM save first. On a pod every worker runs it.

  derta train configs/tiny.yaml model.path=MODEL data.path=data/mine train.output=runs/first train.steps=50
"""

PROTECT = """\
Fine-tune on data that may hide harmful answers, beneath security vectors (arXiv 2311.02105), by one config in three
phases: an adapter learns the harmful answers that are known; the model learns the user's data while the adapter is
active; the model is released without it, with a report of what it did and did not learn. The same command goes on where
it was stopped.

  derta protect configs/protect/tiny.yaml model.path=MODEL vectors.data.path=data/known fine_tune.data.path=data/users
"""

DOCTOR = """\
Check in seconds what would stop a run after minutes: that all processes of the pod are there, with the same versions
and devices, that the mesh fits, that collectives work, that memory, disk, clocks and the output directory are as a run
needs them. Without a config, the machines alone. `derta train` makes the same checks first.

  derta doctor configs/tiny.yaml model.path=MODEL data.path=data/mine
"""

PLAN = """\
Compile the train step of a config for a TPU slice that need not exist, and say what it needs of a chip, how long a step
takes by the compiler's estimate, what moves between chips, and what the whole run costs. Where it does not fit, the
nearest change that does is found by trying. Answers are kept, so that the same question takes a second the next time.

  derta plan configs/llama3_8b_full.yaml --slice v5e-16,v5p-8
  derta plan configs/llama3_8b_full.yaml --slice v5e-16 --search
  derta plan configs/llama3_8b_full.yaml --slice v5e-4,v5e-8 --generate 32x512x256
"""

BENCH = """\
Time the same training steps, on the same weights and rows, four ways: as the authors of DeRTa take them in PyTorch, as
PyTorch can at its best, and ours without and with packing. They take turns, each in a process of its own; their losses
must agree.

  derta bench configs/bench_cpu.yaml --output bench

or, with a word before the config: how fast a run's rows are read, tokenised, packed and made into batches; how fast
answers are made beside transformers' own `generate`; how our steps scale with length, batch, vocabulary and mix.

  derta bench data configs/tiny.yaml model.path=MODEL data.path=data/mine
  derta bench generate configs/bench_cpu.yaml
  derta bench sweep configs/bench_cpu.yaml repeats=3 --output sweep
"""

GENERATE = """\
Answer every prompt of a file, greedily unless told otherwise; answers come in the order of the prompts. They are kept
as they are made, and the same command goes on after a stop.

  derta generate runs/first --prompts questions.jsonl --output answers.jsonl --max-new-tokens 128
"""

SERVE = """\
Answer on this machine as OpenAI's API does (/v1/chat/completions, /v1/completions, /v1/models, /health), so that PAIR,
Inspect, HarmBench, EasyJailbreak and OpenAI's own client can ask the model. Requests join while others run; answers may
be streamed. Ctrl-C finishes what has begun. Needs the extra `serve`. See docs/serving.md.

  derta serve runs/first --port 8000
  DERTA_TOKEN=$(openssl rand -hex 16) derta serve runs/first --host 0.0.0.0
"""

EVALUATE = """\
Ask models what a suite says: attacks, harmless prompts, questions with a right answer; or, without a suite, harmful
questions plainly, after the first tokens of a harmful answer (prefill), and as raw text to complete. Writes
results.json, results.md, report.html and every answer; the same command goes on after a stop. The judge is a rule
unless told otherwise: a tool to rank models, not a label. See docs/evaluation.md and docs/judging.md.

  derta evaluate vanilla=runs/vanilla derta=runs/derta --suite configs/evaluation/paper.yaml --output eval
  derta evaluate runs/derta --harmful harmful.jsonl --benign benign.jsonl --output eval --judge judge.yaml
"""

JUDGE = """\
Judge answers that `derta evaluate` wrote once more, by another judge, by people, or both; print attack success with its
interval and how far the judges agree. A judge is built in (refusal-rule, first-person, keywords-prefix,
keywords-anywhere) or described in a YAML file: a model behind an OpenAI-compatible endpoint. See docs/judging.md.

  derta judge eval/answers/*.jsonl --judge judge.yaml --output eval/judged
  derta judge eval/answers/*.jsonl --label-sheet labels.csv --blind --per-attack 20
  derta judge eval/answers/*.jsonl --labels labels.csv
"""

ANSWERS = """\
Write the answers to one set of prompts as other tools read them, so that their judges can be run on them: AlpacaEval's
model outputs, HarmBench's completions, EasyJailbreak's instances.

  derta answers eval/answers/derta.jsonl --set alpaca --for alpaca --output alpaca.json
"""

EXPORT = """\
Write a run's weights as safetensors under Hugging Face names, with the original's config, generation config, tokenizer
and chat template and a model card, for transformers and vLLM. What was trained with LoRA becomes a PEFT adapter, or
with --merged a whole model. Tensors pass through one at a time: no host has to hold the model.

  derta export runs/first exported/first
  derta export runs/lora exported/lora-merged --merged
"""

CONVERT = """\
Turn a Hugging Face directory, hub id or gs:// URL into a checkpoint, which `model.path` reads as well and every process
of a pod reads its own part of; or a checkpoint (a run or a converted model) back into a Hugging Face directory.

  derta convert models/llama checkpoints/llama
  derta convert checkpoints/llama models/llama-again
"""
