// The fuzz target on a fixed sequence of inputs, for compilers without libFuzzer: random ones, and such as hold the same byte
// everywhere; then every type with every number of columns, and many numbers of blocks; and one activation that is not finite, anywhere.
//   fuzz_main COUNT

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerInitialize(int * argc, char *** argv);
extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size);

static const int NTYPES = 6;

static std::mt19937 rng(0);

// an input whose first bytes are given, and whose others are random or all the same
static void run(std::vector<uint8_t> data, size_t size, int byte) {
    while (data.size() < size) {
        data.push_back(byte < 0 ? rng() : byte);
    }
    // exactly as large as it is, as libFuzzer's are
    uint8_t * copy = (uint8_t *) malloc(data.size());
    std::copy(data.begin(), data.end(), copy);
    LLVMFuzzerTestOneInput(copy, data.size());
    free(copy);
}

int main(int argc, char ** argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: %s COUNT\n", argv[0]);
        return 2;
    }
    LLVMFuzzerInitialize(&argc, &argv);

    for (int byte : { 0x00, 0x01, 0x3F, 0x40, 0x41, 0x7F, 0x80, 0x81, 0xC0, 0xFE, 0xFF }) {
        for (uint8_t type = 0; type < NTYPES; type++) {
            for (uint8_t flags = 0; flags < 8; flags++) {
                run({ type, (uint8_t) rng(), (uint8_t) rng(), (uint8_t) rng(), flags }, 64, byte);
            }
        }
    }
    for (uint8_t type = 0; type < NTYPES; type++) {
        for (uint8_t nb = 0; nb < 20; nb += type < 3 ? 1 : 2) {
            for (uint8_t w = 0; w < 12; w++) {
                run({ type, (uint8_t) (nb + w % 2), w, (uint8_t) rng(), (uint8_t) (rng() % 4) }, 1000, -1);
            }
        }
    }
    for (uint8_t type = 0; type < NTYPES; type++) {
        for (int at = 0; at < (type < 5 ? 64 : 128); at++) {
            const uint8_t nb = at % 16 == 15 ? 17 : at % 2; // blocks less one
            run({ type, nb, (uint8_t) rng(), (uint8_t) at, (uint8_t) (8 | rng() % 4 << 4 | rng() % 2 << 1) }, 400, -1);
        }
    }
    for (int i = 0; i < atoi(argv[1]); i++) {
        run({}, rng() % 2000, -1);
    }
    printf("all ok\n");
    return 0;
}
