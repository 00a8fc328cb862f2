// PROGRAM CASE RESULT [--option=value ...]: runs the launcher that the case names.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "case.h"
#include "runtime.h"

namespace fastattn::emu {

namespace {

std::map<std::string, Launcher>& launchers() {
  static std::map<std::string, Launcher> all;
  return all;
}

[[noreturn]] void usage(const char* what) {
  std::fprintf(stderr, "emulator: option: %s\n", what);
  std::exit(72);
}

unsigned long number(const char* value) {
  char* end = nullptr;
  const unsigned long n = std::strtoul(value, &end, 0);
  if (end == value || *end) usage(value);
  return n;
}

Schedule schedule_of(const std::string& name) {
  if (name == "forward") return Schedule::kForward;
  if (name == "reverse") return Schedule::kReverse;
  if (name == "cyclic") return Schedule::kCyclic;
  if (name == "random") return Schedule::kRandom;
  usage(name.c_str());
}

void parse(const char* argument) {
  const char* equals = std::strchr(argument, '=');
  if (!equals) usage(argument);
  const std::string key(argument, equals);
  const char* value = equals + 1;
  if (key == "--schedule") {
    options.schedule = schedule_of(value);
  } else if (key == "--seed") {
    options.seed = static_cast<uint32_t>(number(value));
  } else if (key == "--cp-async") {
    options.lazy = std::strcmp(value, "lazy") == 0;
    if (!options.lazy && std::strcmp(value, "eager") != 0) usage(value);
  } else if (key == "--poison") {
    options.poison = static_cast<uint32_t>(number(value));
  } else if (key == "--resident") {
    options.resident = static_cast<unsigned>(number(value));
  } else if (key == "--max-cooperative") {
    options.max_cooperative = static_cast<unsigned>(number(value));
  } else if (key == "--shared-limit") {
    options.shared_limit = number(value);
  } else if (key == "--seconds") {
    alarm(static_cast<unsigned>(number(value)));
  } else {
    usage(argument);
  }
}

}  // namespace

RegisterLauncher::RegisterLauncher(const char* name, Launcher f) { launchers()[name] = f; }

}  // namespace fastattn::emu

int main(int argc, char** argv) {
  using namespace fastattn::emu;
  if (argc < 3) usage("CASE RESULT are missing");
  for (int i = 3; i < argc; ++i) parse(argv[i]);
  Case c(argv[1]);
  const auto it = launchers().find(c.launcher);
  if (it == launchers().end()) usage(("no launcher '" + c.launcher + "'").c_str());
  const cudaError_t error = it->second(c);
  c.check_all_used();
  c.write(argv[2], error);
  return 0;
}
