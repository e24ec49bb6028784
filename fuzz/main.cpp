// Runs LLVMFuzzerTestOneInput on a corpus and on mutations of it, for compilers without libFuzzer. Inputs that reach new
// code join the corpus.
//
//   operators [--seconds N] [--runs N] [--seed N] [--keep FOLDER] [--faults] FILE_OR_FOLDER..
//   --keep    where inputs that reached new code are written, those of the corpus included
//   --faults  instead of mutating, runs every input with its 1st, 2nd, .. allocation refused, then with its 1st, 2nd, ..
//             call of ONNX Runtime failing, until none is left to fail
//
// An input that crashes, or takes more than 10 seconds of processor time or waits for a minute, is written to ./crash-SEED, and the program ends with an error.
#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#if !defined(_WIN32)
#include <sanitizer/common_interface_defs.h>
#include <sys/time.h>
#include <unistd.h>
#endif

#include "allocations.h"
#include "coverage.h"
#include "fake_ort.h"
#include "operators.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

using Input = std::vector<uint8_t>;

constexpr size_t LONGEST = 512;
constexpr size_t HEAD = 32;  // bytes of attributes, which are changed more often
constexpr unsigned LONGEST_SECONDS = 10;  // of processor time, as the machine may be busy
constexpr unsigned LONGEST_WAIT = 60;     // seconds, of an input that waits for something
constexpr size_t KEPT = 240;  // see operators.cpp: bytes below it make a valid node
constexpr uint8_t CHANGING[] = {0, 240, 244, 246, 247, 248, 249, 250, 251, 252, 255};

unsigned seed = 1;
std::minstd_rand generator;
const Input* current = nullptr;

size_t below(size_t end) { return generator() % end; }

void write(const Input& input, const std::string& path) {
  const auto* bytes = reinterpret_cast<const char*>(input.data());
  std::ofstream(path, std::ios::binary).write(bytes, static_cast<std::streamsize>(input.size()));
}

void save_crash() {
  if (!current) return;
  const std::string path = "crash-" + std::to_string(seed);
  write(*current, path);
  std::fprintf(stderr, "the input is in %s\n", path.c_str());
  current = nullptr;
}

#if defined(_WIN32)
void crashed(int) { save_crash(); }

void watch_crashes() {
  for (const int number : {SIGABRT, SIGSEGV, SIGILL, SIGFPE}) std::signal(number, crashed);
}

void watch(unsigned) {}  // whoever runs the program has a limit of its own
#else
void stop(int) {
  std::fprintf(stderr, "an input takes too long\n");
  save_crash();
  _exit(1);
}

void watch_crashes() {
  std::signal(SIGALRM, stop);
  std::signal(SIGPROF, stop);
  __sanitizer_set_death_callback(save_crash);
}

// Gives what follows so many times the longest time; 0: any.
void watch(unsigned times) {
  itimerval left{};
  left.it_value.tv_sec = times * LONGEST_SECONDS;
  setitimer(ITIMER_PROF, &left, nullptr);
  alarm(times * LONGEST_WAIT);
}
#endif

Input valid_input() {
  Input out(8 + below(200));
  for (uint8_t& byte : out) byte = static_cast<uint8_t>(below(4) ? below(KEPT) : below(4));
  return out;
}

void mutate(Input& input, const std::vector<Input>& corpus) {
  for (size_t times = 1 + below(4); times > 0; --times) {
    const size_t end = below(3) ? input.size() + 1 : std::min(input.size() + 1, HEAD);
    const size_t at = below(end), kind = below(8);
    if (kind == 0 && !corpus.empty()) {  // the end of another one
      const Input& other = corpus[below(corpus.size())];
      input.resize(at);
      input.insert(input.end(), other.begin() + static_cast<long>(std::min(at, other.size())), other.end());
    } else if (kind == 1) {
      input.insert(input.begin() + static_cast<long>(at), static_cast<uint8_t>(below(256)));
    } else if (at == input.size()) {
      input.push_back(static_cast<uint8_t>(below(256)));
    } else if (kind == 2) {
      input.erase(input.begin() + static_cast<long>(at));
    } else if (kind < 6) {  // what this byte stands for, and mostly the one behind it
      input[at] = CHANGING[below(sizeof CHANGING)];
      if (at + 1 < input.size()) input[at + 1] = static_cast<uint8_t>(below(256));
    } else {
      input[at] = static_cast<uint8_t>(below(256));
    }
  }
  if (input.size() > LONGEST) input.resize(LONGEST);
}

// Whether it reached code that no input before it has.
bool try_input(const Input& input) {
  const size_t before = fuzz::reached_blocks();
  current = &input;
  watch(1);
  LLVMFuzzerTestOneInput(input.data(), input.size());
  watch(0);
  current = nullptr;
  return fuzz::reached_blocks() > before;
}

// Runs the input with each of its events failing in turn; returns how many there are.
template <class Fail, class Failed>
size_t fail_each(const Input& input, const fuzz::Outcome& expected, Fail fail, Failed failed) {
  for (size_t nth = 1;; ++nth) {
    fail(nth);
    const fuzz::Outcome found = fuzz::run(input.data(), input.size(), nullptr, 4);
    const bool happened = failed();
    fail(0);
    if (!happened) return nth - 1;
    const bool fewer = found.results < expected.results && found.errors > 0;
    if (!fewer && (found.results != expected.results || found.numbers != expected.numbers)) {
      std::fprintf(stderr, "fault %zu: another result, and no error\n", nth);
      std::abort();
    }
  }
}

size_t run_faults(const std::vector<Input>& corpus) {
  size_t out = 0;
  for (const Input& input : corpus) {
    current = &input;
    watch(6);
    const fuzz::Outcome expected = fuzz::run(input.data(), input.size(), nullptr, 4);
    out += fail_each(input, expected, fuzz::refuse_allocation, fuzz::was_refused);
    out += fail_each(input, expected, fuzz::fail_call, fuzz::was_failed);
    watch(0);
  }
  current = nullptr;
  return out;
}

void read_corpus(const std::filesystem::path& path, std::vector<Input>& corpus) {
  if (std::filesystem::is_directory(path)) {
    for (const auto& entry : std::filesystem::directory_iterator(path)) read_corpus(entry.path(), corpus);
    return;
  }
  std::ifstream file(path, std::ios::binary);
  corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

void keep(const Input& input, const std::string& folder) {
  uint64_t name = 0xcbf29ce484222325;
  for (const uint8_t byte : input) name = (name ^ byte) * 0x100000001b3;
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(name));
  write(input, folder + "/" + text);
}

}  // namespace

// Where memory is refused malloc returns null, and an abort() is reported as a crash is.
extern "C" const char* __asan_default_options() { return "allocator_may_return_null=1:handle_abort=2"; }
extern "C" const char* __tsan_default_options() { return "allocator_may_return_null=1:handle_abort=2"; }

int main(int count, char** arguments) {
  double seconds = 0;
  size_t most = SIZE_MAX;
  bool faults = false;
  std::string kept;
  std::vector<Input> corpus;
  for (int i = 1; i < count; ++i) {
    const std::string name = arguments[i];
    if (name == "--faults") faults = true;
    else if (name == "--seconds") seconds = std::atof(arguments[++i]);
    else if (name == "--runs") most = static_cast<size_t>(std::atoll(arguments[++i]));
    else if (name == "--seed") seed = static_cast<unsigned>(std::atoi(arguments[++i]));
    else if (name == "--keep") kept = arguments[++i];
    else read_corpus(name, corpus);
  }
  generator.seed(seed);
  watch_crashes();
  std::sort(corpus.begin(), corpus.end(),
            [](const Input& a, const Input& b) { return a.size() != b.size() ? a.size() < b.size() : a < b; });
  corpus.erase(std::unique(corpus.begin(), corpus.end()), corpus.end());
  if (faults) {
    std::printf("%zu inputs, %zu faults\n", corpus.size(), run_faults(corpus));
    return 0;
  }
  const size_t given = corpus.size();
  for (const Input& input : corpus)
    if (try_input(input) && !kept.empty()) keep(input, kept);
  const auto start = std::chrono::steady_clock::now();
  size_t runs = 0;
  for (; runs < most && std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds; ++runs) {
    Input input = corpus.empty() || below(2) ? valid_input() : corpus[below(corpus.size())];
    mutate(input, corpus);
    if (!try_input(input)) continue;
    if (!kept.empty()) keep(input, kept);
    corpus.push_back(std::move(input));
  }
  std::printf("%zu inputs and %zu mutations, %zu of them valid; %zu kept, %zu blocks of code reached\n", given, runs,
              fuzz::valid_inputs(), corpus.size() - given, fuzz::reached_blocks());
}
