#include "case.h"

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "runtime.h"

namespace fastattn::emu {

namespace {

[[noreturn]] void bad(const std::string& what) {
  std::fprintf(stderr, "emulator: case: %s\n", what.c_str());
  std::exit(72);
}

Tensor parse_tensor(std::istringstream& line) {
  Tensor t;
  std::string direction;
  size_t ndim = 0;
  line >> t.name >> t.dtype >> direction >> t.lead >> t.bytes >> ndim;
  t.out = direction == "out";
  t.sizes.resize(ndim);
  t.strides.resize(ndim);
  for (auto& x : t.sizes) line >> x;
  for (auto& x : t.strides) line >> x;
  if (!line || (direction != "in" && !t.out)) bad("tensor line of '" + t.name + "'");
  return t;
}

}  // namespace

Case::Case(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text;
  if (!std::getline(file, text) || text != "fastattn-case 1") bad("no case in " + path);
  while (std::getline(file, text) && text != "end") {
    std::istringstream line(text);
    std::string word, name;
    line >> word;
    if (word == "launcher") {
      line >> launcher;
    } else if (word == "int" || word == "float") {
      line >> name;
      line >> numbers_[name].text;
    } else if (word == "tensor") {
      tensors_.push_back(parse_tensor(line));
    } else {
      bad("line '" + text + "'");
    }
  }
  for (Tensor& t : tensors_) {
    // An empty tensor has an address too, of which no byte may be touched.
    t.allocation = static_cast<unsigned char*>(std::malloc(t.lead + t.bytes));
    file.read(reinterpret_cast<char*>(t.data()), static_cast<std::streamsize>(t.bytes));
    if (!file) bad("the file ends within tensor '" + t.name + "'");
    register_region(t.data(), t.bytes, "tensor " + t.name);
  }
}

Case::~Case() {
  for (Tensor& t : tensors_) std::free(t.allocation);
}

int64_t Case::integer(const std::string& name) {
  const auto it = numbers_.find(name);
  if (it == numbers_.end()) bad("the launcher asks for int '" + name + "'");
  it->second.used = true;
  return std::strtoll(it->second.text.c_str(), nullptr, 10);
}

double Case::real(const std::string& name) {
  const auto it = numbers_.find(name);
  if (it == numbers_.end()) bad("the launcher asks for float '" + name + "'");
  it->second.used = true;
  return std::strtod(it->second.text.c_str(), nullptr);
}

Tensor* Case::find(const std::string& name) {
  for (Tensor& t : tensors_) {
    if (t.name == name) {
      t.used = true;
      return &t;
    }
  }
  return nullptr;
}

Tensor& Case::tensor(const std::string& name) {
  Tensor* t = find(name);
  if (!t) bad("the launcher asks for tensor '" + name + "'");
  return *t;
}

void Case::check_all_used() const {
  for (const auto& [name, number] : numbers_) {
    if (!number.used) bad("launcher " + launcher + " does not know '" + name + "'");
  }
  for (const Tensor& t : tensors_) {
    if (!t.used) bad("launcher " + launcher + " does not know tensor '" + t.name + "'");
  }
}

void Case::write(const std::string& path, cudaError_t error) const {
  std::ofstream file(path, std::ios::binary);
  file << "error " << static_cast<int>(error) << "\n";
  for (const Tensor& t : tensors_) {
    if (t.out) file << "tensor " << t.name << " " << t.bytes << "\n";
  }
  file << "end\n";
  for (const Tensor& t : tensors_) {
    if (!t.out) continue;
    file.write(reinterpret_cast<const char*>(t.allocation + t.lead),
               static_cast<std::streamsize>(t.bytes));
  }
  file.close();
  if (!file) bad("cannot write " + path);
}

}  // namespace fastattn::emu
