// Nodes of the operators, from bytes: their attributes, tensors and data file, and calls of their kernels.
//
// Without bytes the node is a valid one. Each number, type and presence takes bytes, of which most values keep what is
// valid: an input is a valid node with a few changes. What a byte stands for depends little on the bytes before it, so
// that a mutation changes one thing. Under sanitizers, whatever happens must be a status.
#include "operators.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <thread>

#if !defined(_WIN32)
#include <sys/stat.h>
#endif

#include "allocations.h"
#include "fake_ort.h"
#include "isa/dispatch.h"
#include "ort/parallel.h"

namespace fuzz {
namespace {

using namespace pard;

constexpr unsigned MANY = 4;  // threads enough for any mistake of theirs, also on a small machine
std::atomic<unsigned> hardware_threads{MANY};

constexpr int64_t NUMBERS[] = {
    0, 1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 48, 64, 127, 128, 255, 256, 4096, 65536, -1, -2, -16, -128,
    INT64_MAX, INT64_MIN, INT64_MAX - 15, INT64_MIN + 1, INT32_MAX, INT32_MIN, int64_t{1} << 31, int64_t{1} << 32,
    (int64_t{1} << 32) + 4, int64_t{1} << 33, int64_t{1} << 40, (int64_t{1} << 57) + 4, int64_t{1} << 58,
    int64_t{1} << 59, int64_t{1} << 60, (int64_t{1} << 60) + 4, int64_t{1} << 61, int64_t{1} << 62,
    (int64_t{1} << 62) + 16, (int64_t{1} << 62) - 16, INT64_MAX / 3, INT64_MAX / 5, int64_t{1} << 24, 1000003};
constexpr float FLOATS[] = {0.0f, -0.0f, 1.0f, 0.125f, -1.0f, 1e-40f, 3e38f, HUGE_VALF, -HUGE_VALF, NAN};
constexpr uint8_t KEPT = 240;  // of 256 values of a byte: what they stand for stays valid

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : at_(data), end_(data + size) {}

  uint8_t next() { return at_ < end_ ? *at_++ : 0; }
  size_t below(size_t end) { return next() % end; }
  bool changes() { return next() >= KEPT; }

  // `valid`, a number near it, one that products may wrap to the same, or any.
  int64_t near(int64_t valid) {
    const uint8_t kind = next(), which = next();
    if (kind < KEPT) return valid;
    const auto bits = static_cast<uint64_t>(valid);
    if (kind < KEPT + 4) return static_cast<int64_t>(bits + which - (which > 127 ? 256 : 0));
    if (kind < KEPT + 6) return static_cast<int64_t>(bits << which % 64);
    const int exponent = which % 2 ? 48 + which / 2 % 16 : which / 2 % 64;
    if (kind < KEPT + 12) return static_cast<int64_t>(bits + (uint64_t{1} << exponent));
    return NUMBERS[which % (sizeof NUMBERS / sizeof *NUMBERS)];
  }

 private:
  const uint8_t *at_, *end_;
};

// A node's parts while they are put together.
struct Case {
  Bytes bytes;
  std::minstd_rand random;
  OrtKernelInfo info;
  std::vector<std::unique_ptr<OrtValue>> values;

  Case(const uint8_t* data, size_t size) : bytes(data, size), random(1 + bytes.next()) {}

  void integer(const std::string& name, int64_t valid) {
    attribute(name, {Attribute::Type::integer, bytes.near(valid), 0, {}});
  }

  void attribute(const std::string& name, Attribute valid) {
    const uint8_t kind = bytes.next();
    if (kind >= KEPT + 12) return;
    if (kind >= KEPT) valid.type = static_cast<Attribute::Type>(kind % 4);
    info.attributes[name] = std::move(valid);
  }

  // One that a valid node does not have.
  void needless(const std::string& name) {
    const bool there = bytes.changes();
    const int64_t number = bytes.near(0);
    if (there) attribute(name, {Attribute::Type::integer, number, 0, {}});
  }

  std::vector<int64_t> shape(std::vector<int64_t> valid) {
    const bool changes = bytes.changes();
    const size_t rank = bytes.below(6);
    if (changes) valid.resize(rank, 1);
    for (int64_t& dim : valid) dim = std::max<int64_t>(bytes.near(dim), 0);
    if (count_of(valid) > MOST_ELEMENTS) valid[0] = 0;  // there is no such tensor, but an empty one
    return valid;
  }

  const OrtValue* value(int type, std::vector<int64_t> valid) {
    const uint8_t kind = bytes.next();
    if (kind >= KEPT + 8) type = static_cast<int>(kind % 17);
    else if (kind >= KEPT) return nullptr;
    values.push_back(std::make_unique<OrtValue>(new_value(type, shape(std::move(valid)), 0)));
    OrtValue& out = *values.back();
    fill(out.data.get(), count_of(out.shape) * element_bytes(type), type == ORT_UINT8 ? 1 : sizeof(float));
    return &out;
  }

  // Numbers from -1 to 1, seldom others; or any bytes.
  void fill(void* target, size_t bytes_, size_t width) {
    auto* at = static_cast<uint8_t*>(target);
    for (size_t i = 0; i + width <= bytes_; i += width) {
      const float number = static_cast<float>(random() % 257) / 128.0f - 1.0f;
      width == 1 ? void(at[i] = static_cast<uint8_t>(random() >> 8)) : void(std::memcpy(at + i, &number, width));
    }
    const bool special = bytes.changes();
    const float number = FLOATS[bytes.below(sizeof FLOATS / sizeof *FLOATS)];
    for (size_t i = bytes_ >= sizeof number && special ? 1 + random() % 3 : 0; i > 0; --i)
      std::memcpy(at + random() % (bytes_ / sizeof number) * sizeof number, &number, sizeof number);
  }

  void input(const OrtValue* value, bool constant = false) {
    info.inputs.push_back(value);
    info.constants.push_back(bytes.changes() ? !constant : constant);
  }
};

const std::string& folder() {
  static const std::string path = [] {
    std::random_device entropy;
    std::string name;
    do name = (std::filesystem::temp_directory_path() / ("pard-fuzz-" + std::to_string(entropy()))).string();
    while (!std::filesystem::create_directory(name));
    static struct Removed {
      std::string path;
      ~Removed() {
        std::error_code ignored;
        std::filesystem::remove_all(path, ignored);
      }
    } removed{name};
#if !defined(_WIN32)  // where a pipe is no file
    mkfifo((name + "/pipe").c_str(), 0600);
#endif
    return name;
  }();
  return path;
}

struct Matrix {
  int64_t bits, block, n, k;
  bool zeros, minimums, half;

  explicit Matrix(Bytes& bytes, bool gated) {
    const size_t kind = bytes.next();
    bits = kind & 1 ? 8 : 4;
    block = 32 << (kind >> 1) % 3;
    minimums = bits == 4 && kind & 8;
    zeros = !minimums && kind & 16;
    half = minimums || kind & 32;
    n = gated ? static_cast<int64_t>(16 * (1 + bytes.below(2))) : static_cast<int64_t>(1 + bytes.below(56));
    k = block * static_cast<int64_t>(1 + bytes.below(2));
  }

  int64_t blocks() const { return k / block; }
  int64_t zero_bytes() const { return (blocks() * bits + 7) / 8; }
};

void set_shape(Case& c, const Matrix& m) {
  c.integer("bits", m.bits);
  c.integer("block_size", m.block);
  c.integer("K", m.k);
  c.integer("N", m.n);
}

// Adds a matrix to the file, and the attributes that say where it is.
void store(Case& c, const Matrix& m, const std::string& prefix, std::string& file) {
  const auto part = [&](const char* name, bool is_there, int64_t size, bool halves) {
    if (!is_there) return c.needless(prefix + name);
    const size_t at = file.size();
    c.integer(prefix + name, static_cast<int64_t>(at));
    file.resize(at + static_cast<size_t>(size));
    if (halves)
      for (size_t i = at + 1; i < file.size(); i += 2) file[i] = static_cast<char>(c.random() % 60 | (c.random() % 2) << 7);
    else
      c.fill(&file[at], static_cast<size_t>(size), std::strcmp(name, "scales_offset") ? 1 : sizeof(float));
  };
  part("B_offset", true, m.n * m.k * m.bits / 8, false);
  part("scales_offset", true, m.n * m.blocks() * (m.half ? 2 : 4), m.half);
  part("zero_points_offset", m.zeros, m.n * m.zero_bytes(), false);
  part("minimums_offset", m.minimums, m.n * m.blocks() * 2, true);
  m.half ? c.integer(prefix + "scales_half", 1) : c.needless(prefix + "scales_half");
}

// Puts the file in its place, or something else.
void write_file(Case& c, const std::string& content) {
  const std::string path = folder() + "/data";
  const char* const others[] = {"/nowhere", "/pipe", "", "/../"};
  const bool other = c.bytes.changes();
  Attribute name{Attribute::Type::text, 0, 0, other ? folder() + others[c.bytes.below(4)] : path};
  if (c.bytes.changes()) name.text.insert(c.bytes.next() % (name.text.size() + 1), 1, '\0');
  if (c.bytes.changes()) name.text = "/dev/zero";
  c.attribute("weights_file", std::move(name));
  std::ofstream(path, std::ios::binary).write(content.data(), static_cast<std::streamsize>(content.size()));
  const int64_t size = c.bytes.near(static_cast<int64_t>(content.size()));
  std::error_code ignored;  // no file is that large: it stays as it is
  if (size != static_cast<int64_t>(content.size()) && size >= 0)
    std::filesystem::resize_file(path, static_cast<uintmax_t>(size), ignored);
}

using Calls = std::vector<OrtKernelContext>;

Calls matmul_calls(Case& c, int64_t k) {
  Calls out(1 + c.bytes.below(3));
  for (OrtKernelContext& call : out) {
    const auto rows = static_cast<int64_t>(c.bytes.below(14) + (c.bytes.next() > 253 ? 260 : 0));
    call.inputs = {c.value(ORT_FLOAT, {1, rows, k})};
    if (c.bytes.changes()) call.missing_output = 0;
  }
  return out;
}

Calls plain(Case& c) {
  const Matrix m(c.bytes, false);
  const bool in_file = c.bytes.next() % 2, bias = c.bytes.next() % 2;
  set_shape(c, m);
  c.input(nullptr);
  if (in_file) {
    std::string file;
    store(c, m, "", file);
    write_file(c, file);
    for (int i = 0; i < 3; ++i) c.input(c.bytes.changes() ? c.value(ORT_UINT8, {m.n, m.blocks()}) : nullptr, true);
  } else {
    c.input(c.value(ORT_UINT8, {m.n, m.blocks(), m.block * m.bits / 8}), true);
    c.input(c.value(ORT_FLOAT, {m.n, m.blocks()}), true);
    c.input(m.zeros ? c.value(ORT_UINT8, {m.n, m.zero_bytes()}) : nullptr, true);
    for (const char* name : {"B_offset", "minimums_offset", "scales_half", "weights_file"}) c.needless(name);
  }
  c.input(c.bytes.changes() ? c.value(ORT_FLOAT, {m.k}) : nullptr, true);
  c.input(bias ? c.value(ORT_FLOAT, {m.n}) : nullptr, true);
  if (c.bytes.changes()) c.info.inputs.resize(c.bytes.below(7));
  c.info.constants.resize(c.info.inputs.size());
  return matmul_calls(c, m.k);
}

Calls gated(Case& c) {
  const Matrix m(c.bytes, true);
  set_shape(c, m);
  c.input(nullptr);
  std::string file;
  store(c, m, "gate_", file);
  store(c, m, "up_", file);
  write_file(c, file);
  return matmul_calls(c, m.k);
}

Calls attention(Case& c) {
  Bytes& b = c.bytes;
  const auto kv_heads = static_cast<int64_t>(1 + b.below(2)), heads = kv_heads * static_cast<int64_t>(1 + b.below(3));
  const auto dim = static_cast<int64_t>(16 * (1 + b.below(2)));
  const bool turns = b.next() % 4 != 1, packed = b.next() % 2;
  const auto positions = static_cast<int64_t>(120 + b.below(100));
  const int64_t half = b.next() % 4 ? dim / 2 : static_cast<int64_t>(b.below(static_cast<size_t>(dim) / 2 + 1));
  c.integer("num_heads", heads);
  c.integer("kv_num_heads", kv_heads);
  turns ? c.integer("do_rotary", 1) : c.needless("do_rotary");
  if (b.next() % 2) c.integer("local_window_size", static_cast<int64_t>(1 + b.below(60)));
  if (b.next() % 2) c.attribute("scale", {Attribute::Type::number, 0, b.changes() ? FLOATS[b.below(10)] : 0.125f, {}});
  const OrtValue *cosines = nullptr, *sines = nullptr;
  if (turns) {
    cosines = c.value(ORT_FLOAT, {positions, half});
    sines = c.value(ORT_FLOAT, {positions, half});
    if (cosines && sines && !b.changes()) c.values.back()->shape = cosines->shape, c.values.back()->data = cosines->data;
  }
  Calls out(1 + b.below(2));
  for (OrtKernelContext& call : out) {
    int64_t rows = static_cast<int64_t>(1 + b.below(6)), past = static_cast<int64_t>(b.below(90));
    const int64_t batch = b.next() % 4 == 1 ? 2 : 1, shape_kind = b.next();
    if (shape_kind > 252) rows = 70, past = 0;
    if (batch > 1) shape_kind % 2 ? void(rows = 1) : void(past = 0);
    const std::vector<int64_t> cache = c.shape({batch, kv_heads, past + rows + static_cast<int64_t>(b.below(3)), dim});
    const auto in = [&](int type, const std::vector<int64_t>& shape) { call.inputs.push_back(c.value(type, shape)); };
    in(ORT_FLOAT, {batch, rows, (packed ? heads + 2 * kv_heads : heads) * dim});
    for (int i = 0; i < 2; ++i)
      !packed || b.changes() ? in(ORT_FLOAT, {batch, rows, kv_heads * dim}) : call.inputs.push_back(nullptr);
    for (int i = 0; i < 2; ++i) in(ORT_FLOAT, cache);
    const OrtValue* lasts = c.value(ORT_INT32, {batch});
    for (size_t i = 0; lasts && lasts->type == ORT_INT32 && i < count_of(lasts->shape); ++i)
      static_cast<int32_t*>(lasts->data.get())[i] = static_cast<int32_t>(b.near(past + rows - 1));
    const OrtValue* total = c.value(ORT_INT32, {});
    if (total && total->type == ORT_INT32 && total->data)
      *static_cast<int32_t*>(total->data.get()) = static_cast<int32_t>(b.near(past + rows));
    for (const OrtValue* one : {lasts, total, cosines, sines}) call.inputs.push_back(one);
    if (b.changes()) call.missing_output = b.below(3);
  }
  for (size_t i = 0; i < out[0].inputs.size(); ++i) c.input(out[0].inputs[i], i >= 7);
  if (b.changes()) c.info.inputs.resize(b.below(10));
  c.info.constants.resize(c.info.inputs.size());
  return out;
}

struct Operator {
  const char* name;
  Calls (*make)(Case&);
};
constexpr Operator OPERATORS[] = {{"MatMulNBits", plain}, {"GatedMatMulNBits", gated}, {"GroupQueryAttention", attention}};

// NaN is NaN, whatever its bits.
void hash(const OrtValue& value, Outcome& out) {
  const auto* numbers = static_cast<const float*>(value.data.get());
  for (size_t i = 0; i < count_of(value.shape); ++i) {
    uint32_t bits = 0x7fc00000;
    if (numbers[i] == numbers[i]) std::memcpy(&bits, numbers + i, sizeof bits);
    out.numbers = (out.numbers ^ bits) * 0x100000001b3;
  }
}

// The present caches in the past's own buffers, which every run fills anew.
void bind_caches(OrtKernelContext& call) {
  for (size_t i = 1; i < 3; ++i)
    if (call.inputs.size() > 4 && call.inputs[2 + i] && call.inputs[2 + i]->type == ORT_FLOAT)
      call.outputs[i] = *call.inputs[2 + i];
}

}  // namespace

Outcome run(const uint8_t* data, size_t size, const char* isa, size_t threads) {
  Outcome out;
  std::unique_ptr<Case> made;
  Calls calls;
  const OrtCustomOp* op = nullptr;
  bool bound = false;
  {
    const Uncounted uncounted;
    made = std::make_unique<Case>(data, size);
    const Operator& chosen = OPERATORS[made->bytes.below(3)];
    bound = made->bytes.next() % 2;
    calls = chosen.make(*made);
    for (const OrtCustomOp* each : operators())
      if (std::strcmp(each->GetName(each), chosen.name) == 0) op = each;
    select_isa(isa);
    processors();  // is found out once, and stays MANY
    hardware_threads = static_cast<unsigned>(threads);
  }
  void* kernel = nullptr;
  if (is_error(op->CreateKernelV2(op, nullptr, &made->info, &kernel))) {
    ++out.errors;
    if (kernel) std::abort();
  } else {
    for (OrtKernelContext& call : calls) {
      {
        const Uncounted uncounted;
        call.threads = threads;
        call.garbage = static_cast<uint8_t>(threads);
        if (bound && calls.size() == 1) bind_caches(call);
      }
      if (is_error(op->KernelComputeV2(kernel, &call))) {
        ++out.errors;
        continue;
      }
      ++out.results;
      for (const auto& [index, value] : call.outputs) hash(value, out);
    }
    op->KernelDestroy(kernel);
  }
  const Uncounted uncounted;
  calls.clear();
  made.reset();
  if (unreleased()) std::abort();
  return out;
}

}  // namespace fuzz

#if !defined(_WIN32)  // where the standard library is linked into the program, with one of its own
unsigned std::thread::hardware_concurrency() noexcept { return fuzz::hardware_threads; }
#endif

namespace {
size_t valid = 0;
}

size_t fuzz::valid_inputs() { return valid; }

// libFuzzer's entry point, and that of main.cpp.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const fuzz::Outcome reference = fuzz::run(data, size, "reference", 1);
  const bool alone = size > 0 && data[0] % 4;  // starting threads takes longer than all the rest
  const fuzz::Outcome found = fuzz::run(data, size, nullptr, alone ? 1 : 3);
  if (found.numbers != reference.numbers || found.results != reference.results || found.errors != reference.errors) {
    std::fprintf(stderr, "another result with another instruction set or number of threads\n");
    std::abort();
  }
  valid += reference.errors == 0;
  return 0;
}
