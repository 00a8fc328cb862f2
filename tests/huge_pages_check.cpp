// "1" where the driver's folder in argv[1] has a balloon that reports free pages, else "0".
#include "../csrc/cpu/huge_pages.cpp"

#include <cstdio>

int main(int, char** argv) {
  fastattn::ask_for_huge_pages(argv[0], 0);
  std::puts(fastattn::balloon_reports_free_pages(argv[1]) ? "1" : "0");
}
