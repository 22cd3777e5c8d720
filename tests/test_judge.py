"""The worked example of a judge, against a server of our own: scores, batches, its cache, and no opinion where it fails."""

import http.server
import importlib.util
import json
import threading
from pathlib import Path

import pytest

import mlx_grpo
from mlx_grpo.scoring import score

FILE = Path(mlx_grpo.__file__).parents[1] / "docs" / "judge.py"


class Server(http.server.ThreadingHTTPServer):
    """Replies to each request with `reply(message)`, and counts what it is asked."""

    daemon_threads = True

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.requests = reply, []
        self.running, self.most, self.lock = 0, 0, threading.Lock()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            self.server.running += 1
            self.server.most = max(self.server.most, self.server.running)
        status, text = self.server.reply(body["messages"][0]["content"])
        with self.server.lock:
            self.server.running -= 1
        content = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode() if status == 200 else b"busy"
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except OSError:  # the judge has given up waiting
            pass

    def log_message(self, *given):
        pass


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """judge(reply) -> (a function from texts to scores, the server, the module); what the server says is up to the test."""
    servers = []

    def start(reply):
        server = Server(reply)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        spec = importlib.util.spec_from_file_location("judge_example", FILE)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(module, "URL", f"http://127.0.0.1:{server.server_port}/v1/chat/completions")
        monkeypatch.setattr(module, "CACHE", tmp_path / "cache.jsonl")

        def scores(texts):
            columns = {"prompts": ["What is 2 + 2?"] * len(texts), "answer": ["4"] * len(texts), "source": ["x"] * len(texts)}
            return score([module.judge], 60.0, texts, columns)[0].tolist()

        return scores, server, module

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def answer_in(message):
    return message.partition("<answer_to_grade>\n")[2].partition("\n</answer_to_grade>")[0]


def test_scores_are_shares_of_the_best_and_each_text_is_asked_about_once(judged):
    scores, server, module = judged(lambda message: (200, answer_in(message)))
    assert scores(["10", "7", "7", "0"]) == [1.0, 0.7, 0.7, 0.0]
    assert len(server.requests) == 3
    first = server.requests[0]
    assert first["temperature"] == 0.0 and first["model"] == "default_model" and first["max_tokens"] == module.MAX_TOKENS
    message = first["messages"][0]["content"]
    assert "What is 2 + 2?" in message and "<reference>\n4\n" in message
    assert scores(["7", "10", "5"]) == [0.7, 1.0, 0.5] and len(server.requests) == 4  # two were known


def test_requests_go_beside_each_other_and_no_more_than_allowed(judged, monkeypatch):
    three = threading.Barrier(3)

    def together(message):
        three.wait(30)  # nobody is answered before three are asked
        return 200, "5"

    scores, server, module = judged(together)
    monkeypatch.setattr(module, "CONCURRENCY", 3)
    assert scores([f"text {i}" for i in range(9)]) == [0.5] * 9
    assert server.most == 3


@pytest.mark.parametrize("reply", [(500, ""), (200, "I would rather not say"), (200, "11"), (200, "3 or 4"), (200, None)])
def test_no_score_is_no_opinion_and_is_asked_again(judged, capsys, reply):
    replies = [reply]
    scores, server, _ = judged(lambda message: replies[0] if "bad" in message else (200, "Score: 8/10"))
    shown = [None if value != value else value for value in scores(["good", "bad"])]
    assert shown == [0.8, None]
    assert capsys.readouterr().err.startswith("Warning: the judge gave no score for 1 of 2 completions (")
    replies[0] = (200, "2")
    assert scores(["good", "bad"]) == [0.8, 0.2] and len(server.requests) == 3


def test_what_is_late_or_not_reached_is_no_opinion(judged, monkeypatch, capsys):
    released = threading.Event()

    def reply(message):
        if "slow" in message:
            released.wait(10)
        return 200, "6"

    scores, server, module = judged(reply)
    monkeypatch.setattr(module, "TIMEOUT", 0.3)
    late = scores(["slow", "quick"])
    assert late[0] != late[0] and late[1] == 0.6 and "1 of 2" in capsys.readouterr().err
    monkeypatch.setattr(module, "DEADLINE", 0.2)
    monkeypatch.setattr(module, "TIMEOUT", 1.0)
    late = scores(["slow again"])
    assert late[0] != late[0] and "out of time" in capsys.readouterr().err
    released.set()
    monkeypatch.setattr(module, "URL", "http://127.0.0.1:9/v1/chat/completions")
    late = scores(["nobody is there"])
    assert late[0] != late[0] and "the judge gave no score for 1 of 1" in capsys.readouterr().err


def test_a_torn_cache_and_another_rubric_ask_again(judged, monkeypatch):
    scores, server, module = judged(lambda message: (200, "9"))
    assert scores(["a", "b"]) == [0.9, 0.9]
    text = module.CACHE.read_text()
    module.CACHE.write_text(text[: len(text) - 10])
    assert scores(["a", "b"]) == [0.9, 0.9] and len(server.requests) == 3
    monkeypatch.setattr(module, "RUBRIC", "Is it short? {question}{reference}{answer}{best}")
    assert scores(["a"]) == [0.9] and len(server.requests) == 4


def test_braces_in_a_text_are_text(judged):
    scores, server, _ = judged(lambda message: (200, "1"))
    assert scores(["{question} \\frac{1}{2}"]) == [0.1]
    assert "{question} \\frac{1}{2}" in server.requests[0]["messages"][0]["content"]
