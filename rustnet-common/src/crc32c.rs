//! CRC32c (RFC 9260, appendix A) by its linearity: what changes when the first word of a message changes, whatever the rest.

/// The polynomial, lowest power in the highest bit.
const POLYNOMIAL: u32 = 0x82f6_3b78;
/// Doublings of a length in bytes below 16,384.
pub const POWERS: usize = 14;

/// Products with x^(8 * 2^n), for n from 0, of each hexadecimal digit in each of its eight places.
static PRODUCTS: [[[u32; 16]; 8]; POWERS] = products();

const fn products() -> [[[u32; 16]; 8]; POWERS] {
    let mut table = [[[0; 16]; 8]; POWERS];
    // x^8: the highest bit is the lowest power.
    let mut power = 1 << 23;
    let mut n = 0;
    while n < POWERS {
        let mut i = 0;
        while i < 128 {
            table[n][i / 16][i % 16] = multiply(((i % 16) as u32) << (i / 16 * 4), power);
            i += 1;
        }
        power = multiply(power, power);
        n += 1;
    }
    table
}

/// The product of two polynomials modulo ours.
const fn multiply(mut a: u32, b: u32) -> u32 {
    let (mut product, mut i) = (0, 0);
    while i < 32 {
        if b << i >> 31 != 0 {
            product ^= a;
        }
        a = if a & 1 == 0 { a >> 1 } else { a >> 1 ^ POLYNOMIAL };
        i += 1;
    }
    product
}

/// What to add (exclusive or) to the CRC of a message of `len` bytes when its first four change by `diff`, given as loaded
/// from memory. Lengths from 16,384 are taken modulo that: no frame on a wire is so long.
#[inline(always)]
pub fn first_word(diff: u32, len: u32) -> u32 {
    (0..POWERS).fold(u32::from_le(diff), |value, n| step(value, len, n))
}

/// Round `n` of [`first_word`], from 0 to below [`POWERS`]; the first value is `diff` in little-endian order.
#[inline(always)]
pub fn step(value: u32, len: u32, n: usize) -> u32 {
    let Some(products) = PRODUCTS.get(n) else { return value };
    let mut product = 0;
    for (place, digits) in products.iter().enumerate() {
        product ^= digits[(value >> (place * 4) & 15) as usize];
    }
    // Without a branch: the verifier would follow every combination of them.
    let taken = ((len << (31 - n)).cast_signed() >> 31).cast_unsigned();
    value ^ (value ^ product) & taken
}

#[cfg(test)]
mod tests {
    use super::{POLYNOMIAL, first_word};

    /// Bit by bit, from the definition.
    fn crc(data: &[u8]) -> u32 {
        !data.iter().fold(!0_u32, |crc, byte| {
            (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (POLYNOMIAL & 0_u32.wrapping_sub(crc & 1)))
        })
    }

    /// The check value of the CRC catalogues.
    #[test]
    fn the_definition_itself() {
        assert_eq!(crc(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn an_update_equals_a_new_crc() {
        let mut data: [u8; 3000] = core::array::from_fn(|i| (i * 7) as u8);
        for len in (4..70).chain([100, 255, 256, 257, 1500, 2999, 3000]) {
            let before = crc(&data[..len]);
            let old = u32::from_ne_bytes([data[0], data[1], data[2], data[3]]);
            data[..4].copy_from_slice(&[1, 0xff, len as u8, 0x80]);
            let new = u32::from_ne_bytes([data[0], data[1], data[2], data[3]]);
            assert_eq!(before ^ first_word(old ^ new, len as u32), crc(&data[..len]), "{len} bytes");
        }
    }
}
