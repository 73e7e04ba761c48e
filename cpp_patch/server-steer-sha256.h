// server-steer-sha256.h - SHA-256 (FIPS 180-4), fed piece by piece. Our own: not every llama.cpp has one.
#ifndef SERVER_STEER_SHA256_H
#define SERVER_STEER_SHA256_H

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <string>

class server_steer_sha256 {
public:
    void update(const void * data, size_t size) {
        const auto * bytes = static_cast<const uint8_t *>(data);
        n_bytes += size;
        while (size > 0) {
            const size_t part = std::min(size, block.size() - n_block);
            memcpy(block.data() + n_block, bytes, part);
            bytes += part;
            size -= part;
            n_block += part;
            if (n_block == block.size()) {
                add_block();
                n_block = 0;
            }
        }
    }

    void update(const std::string & text) { update(text.data(), text.size()); }

    void update_u32(uint32_t x) {
        const uint8_t b[4] = { (uint8_t) x, (uint8_t) (x >> 8), (uint8_t) (x >> 16), (uint8_t) (x >> 24) };
        update(b, 4);
    }

    // The digest in hex. Nothing can be added after it.
    std::string hex() {
        const uint64_t n_bits = n_bytes * 8;
        update("\x80", 1);
        while (n_block != block.size() - 8) {
            update("", 1);
        }
        for (int shift = 56; shift >= 0; shift -= 8) {
            const uint8_t byte = (uint8_t) (n_bits >> shift);
            update(&byte, 1);
        }
        std::string res;
        for (uint32_t word : state) {
            for (int shift = 28; shift >= 0; shift -= 4) {
                res += "0123456789abcdef"[(word >> shift) & 15];
            }
        }
        return res;
    }

private:
    static uint32_t rotate(uint32_t x, int n) { return (x >> n) | (x << (32 - n)); }

    void add_block() {
        // the first 32 bits of the fractional parts of the cube roots of the first 64 primes
        static constexpr uint32_t K[64] = {
            0x428a2f98,
            0x71374491,
            0xb5c0fbcf,
            0xe9b5dba5,
            0x3956c25b,
            0x59f111f1,
            0x923f82a4,
            0xab1c5ed5,
            0xd807aa98,
            0x12835b01,
            0x243185be,
            0x550c7dc3,
            0x72be5d74,
            0x80deb1fe,
            0x9bdc06a7,
            0xc19bf174,
            0xe49b69c1,
            0xefbe4786,
            0x0fc19dc6,
            0x240ca1cc,
            0x2de92c6f,
            0x4a7484aa,
            0x5cb0a9dc,
            0x76f988da,
            0x983e5152,
            0xa831c66d,
            0xb00327c8,
            0xbf597fc7,
            0xc6e00bf3,
            0xd5a79147,
            0x06ca6351,
            0x14292967,
            0x27b70a85,
            0x2e1b2138,
            0x4d2c6dfc,
            0x53380d13,
            0x650a7354,
            0x766a0abb,
            0x81c2c92e,
            0x92722c85,
            0xa2bfe8a1,
            0xa81a664b,
            0xc24b8b70,
            0xc76c51a3,
            0xd192e819,
            0xd6990624,
            0xf40e3585,
            0x106aa070,
            0x19a4c116,
            0x1e376c08,
            0x2748774c,
            0x34b0bcb5,
            0x391c0cb3,
            0x4ed8aa4a,
            0x5b9cca4f,
            0x682e6ff3,
            0x748f82ee,
            0x78a5636f,
            0x84c87814,
            0x8cc70208,
            0x90befffa,
            0xa4506ceb,
            0xbef9a3f7,
            0xc67178f2,
        };
        std::array<uint32_t, 64> w;
        for (size_t i = 0; i < 16; ++i) {
            const uint8_t * b = block.data() + 4 * i;
            w[i] = (uint32_t) b[0] << 24 | (uint32_t) b[1] << 16 | (uint32_t) b[2] << 8 | b[3];
        }
        for (size_t i = 16; i < 64; ++i) {
            const uint32_t s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ (w[i - 15] >> 3);
            const uint32_t s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ (w[i - 2] >> 10);
            w[i] = w[i - 16] + s0 + w[i - 7] + s1;
        }
        auto [a, b, c, d, e, f, g, h] = state;
        for (size_t i = 0; i < 64; ++i) {
            const uint32_t t1 = h + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + ((e & f) ^ (~e & g)) + K[i] + w[i];
            const uint32_t t2 = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
            h = g;
            g = f;
            f = e;
            e = d + t1;
            d = c;
            c = b;
            b = a;
            a = t1 + t2;
        }
        const std::array<uint32_t, 8> more = { a, b, c, d, e, f, g, h };
        for (size_t i = 0; i < state.size(); ++i) {
            state[i] += more[i];
        }
    }

    std::array<uint32_t, 8> state = { 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19 };
    std::array<uint8_t, 64> block;
    size_t n_block = 0;
    uint64_t n_bytes = 0;
};

#endif // SERVER_STEER_SHA256_H
