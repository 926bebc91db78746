//! Numbers that name things in the maps: stable while the thing lives, and not soon given to another.

/// Hands out numbers from 1 upwards, and round again after `u32::MAX`, leaving out those in use.
#[derive(Debug)]
pub struct Ids {
    next: u32,
    /// Numbers in use when the count last began again, in order.
    taken: Vec<u32>,
    cursor: usize,
}

impl Ids {
    /// Goes on after the highest number that was ever seen.
    pub fn after(highest: u32) -> Self {
        Self { next: highest.wrapping_add(1), taken: Vec::new(), cursor: 0 }
    }

    /// A number that nothing has. `in_use` is asked once in four thousand million times; it need not be in order.
    pub fn take(&mut self, in_use: impl Fn() -> Vec<u32>) -> u32 {
        loop {
            if self.next == 0 {
                self.next = 1;
                self.taken = in_use();
                self.taken.sort_unstable();
                self.cursor = 0;
            }
            let id = self.next;
            self.next = id.wrapping_add(1);
            while self.taken.get(self.cursor).is_some_and(|taken| *taken < id) {
                self.cursor += 1;
            }
            if self.taken.get(self.cursor) != Some(&id) {
                return id;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Ids;

    #[test]
    fn goes_on_after_the_highest() {
        let mut ids = Ids::after(41);
        assert_eq!((ids.take(Vec::new), ids.take(Vec::new)), (42, 43));
        assert_eq!(Ids::after(0).take(Vec::new), 1);
    }

    #[test]
    fn leaves_out_what_is_in_use_when_it_begins_again() {
        let mut ids = Ids::after(u32::MAX - 1);
        let in_use = || vec![5, 1, 2, 2, u32::MAX];
        let got: Vec<u32> = (0..4).map(|_| ids.take(in_use)).collect();
        assert_eq!(got, [u32::MAX, 3, 4, 6]);
    }

    #[test]
    fn a_highest_of_all_begins_again() {
        assert_eq!(Ids::after(u32::MAX).take(|| vec![1]), 2);
    }
}
