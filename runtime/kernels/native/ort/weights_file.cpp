#include "ort/weights_file.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <system_error>
#include <vector>

#include "matmul/half.h"

namespace pard {
namespace {

constexpr size_t PARTS = 4;
constexpr const char* NAMES[PARTS] = {"B", "scales", "zero_points", "minimums"};  // by Part

struct Positions {
  std::string path;
  size_t starts[PARTS] = {};  // bytes
  bool widened = false;       // scales in float16 that the layout has in float32
};

// Of a regular file: reading from a pipe could wait forever, and a device has no end.
uint64_t size_of_file(const std::string& path) {
  demand(!path.empty() && path.find('\0') == std::string::npos, "weights_file is no name of a file");
  std::error_code failure;
  const std::filesystem::path file = std::filesystem::u8path(path);
  const bool regular = std::filesystem::is_regular_file(file, failure);
  const uint64_t size = regular ? std::filesystem::file_size(file, failure) : 0;
  demand(regular && !failure, path, ": cannot be read: ", failure ? failure.message() : "no regular file");
  return size;
}

// Bytes of each part in the file; 0 for those that the layout does not have.
void sizes_of(const Layout& layout, bool widened, size_t (&out)[PARTS]) {
  const size_t n = layout.outputs, numbers = n * layout.blocks();
  out[static_cast<size_t>(Part::levels)] = n * layout.row_bytes();
  out[static_cast<size_t>(Part::scales)] = numbers * (widened ? sizeof(uint16_t) : layout.scale_bytes());
  out[static_cast<size_t>(Part::zero_points)] = layout.format.zero_points ? n * layout.zero_row_bytes() : 0;
  out[static_cast<size_t>(Part::minimums)] = layout.format.minimums ? numbers * layout.scale_bytes() : 0;
}

Positions positions_of(const Node& node, const Layout& layout, const std::string& path, const std::string& prefix) {
  Positions out;
  out.path = path;
  const bool half = node.flag(prefix + "scales_half");
  demand(half || !layout.format.minimums, node.name(), ": minimums beside scales in float32");
  out.widened = half && !layout.format.minimums;
  size_t sizes[PARTS];
  sizes_of(layout, out.widened, sizes);
  const uint64_t end = size_of_file(path);
  for (size_t part = 0; part < PARTS; ++part) {
    const std::string name = prefix + NAMES[part] + "_offset";
    const std::optional<int64_t> start = node.integer(name);
    const bool wanted = sizes[part] > 0;
    demand(start.has_value() == wanted, node.name(), wanted ? ": no attribute " : ": a needless attribute ", name);
    if (!wanted) continue;
    demand(*start >= 0 && static_cast<uint64_t>(*start) <= end && sizes[part] <= end - static_cast<uint64_t>(*start),
           path, ": cannot be read: ", name, " ", *start, " and ", sizes[part], " bytes from there are not within its ",
           end);
    out.starts[part] = static_cast<size_t>(*start);
  }
  return out;
}

// One thread's view of the file: threads do not share a stream, as reading moves it.
class Reader {
 public:
  explicit Reader(const Positions& positions)
      : positions_(positions), stream_(std::filesystem::u8path(positions.path), std::ios::binary) {}

  void read(Part part, size_t offset, size_t count, void* target) {
    const size_t start = positions_.starts[static_cast<size_t>(part)];
    if (part != Part::scales || !positions_.widened) return read(start + offset, count, target);
    halves_.resize(count / sizeof(float));
    read(start + offset / 2, count / 2, halves_.data());
    std::transform(halves_.begin(), halves_.end(), static_cast<float*>(target), float_of_half);
  }

 private:
  void read(size_t at, size_t count, void* target) {
    stream_.seekg(static_cast<std::streamoff>(at));
    stream_.read(static_cast<char*>(target), static_cast<std::streamsize>(count));
    if (!stream_) throw std::runtime_error(positions_.path + ": cannot be read at byte " + std::to_string(at));
  }

  Positions positions_;
  std::ifstream stream_;
  std::vector<uint16_t> halves_;
};

}  // namespace

Source file_source(const Node& node, const Layout& layout, const std::string& path, const std::string& prefix) {
  return [positions = positions_of(node, layout, path, prefix)]() -> Read {
    return [reader = std::make_shared<Reader>(positions)](Part part, size_t offset, size_t count, void* target) {
      reader->read(part, offset, count, target);
    };
  };
}

}  // namespace pard
