//! How the partitions of one version are split among the processes that share it: decided by each of
//! them for itself, by the same rule, from what the database shows.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;

/// Who shares the partitions of one version, and who holds which.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Split {
    /// Processes that share, except those whose partitions were named by hand.
    pub members: BTreeSet<Uuid>,
    /// Partitions that are not free.
    pub holders: BTreeMap<u16, Uuid>,
}

/// What one process is to do about its share.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Moves {
    /// Free partitions to take.
    pub take: BTreeSet<u16>,
    /// Partitions to give up once they have come to rest.
    pub give: BTreeSet<u16>,
}

impl Split {
    /// What `me` holds.
    pub fn held_by(&self, me: Uuid) -> BTreeSet<u16> {
        self.holders.iter().filter(|(_, holder)| **holder == me).map(|(held, _)| *held).collect()
    }

    /// What `me` is to do, so that in the end every partition is held and no two members differ by more
    /// than one. Only free partitions are taken, so nobody is robbed; those who look at the same split
    /// never take the same one. `salt` is the version's own, lest the same process be the one with more
    /// of every version.
    pub fn moves(&self, me: Uuid, partition_count: u16, salt: u32) -> Moves {
        if !self.members.contains(&me) {
            return Moves::default();
        }
        let free: Vec<u16> =
            (0..partition_count).filter(|one| !self.holders.contains_key(one)).collect();
        let mut unclaimed = free.as_slice();
        let mut moves = Moves::default();
        for (member, quota) in self.quotas(free.len(), salt) {
            let held = self.held_by(member);
            let missing = quota.saturating_sub(held.len()).min(unclaimed.len());
            let (claimed, rest) = unclaimed.split_at(missing);
            unclaimed = rest;
            if member == me {
                moves.take = claimed.iter().copied().collect();
                moves.give = held.iter().skip(quota).copied().collect();
            }
        }
        moves
    }

    /// The fair share of every member. Those who hold more keep more, so that nothing moves in vain.
    fn quotas(&self, free_count: usize, salt: u32) -> Vec<(Uuid, usize)> {
        let held_by_members =
            self.holders.values().filter(|holder| self.members.contains(holder)).count();
        let shared_count = free_count + held_by_members;
        let mut ranked: Vec<Uuid> = self.members.iter().copied().collect();
        ranked.sort_by_key(|member| (Reverse(self.held_by(*member).len()), rank(*member, salt)));
        let (each, over) = (shared_count / ranked.len(), shared_count % ranked.len());
        let quota = |(place, member)| (member, each + usize::from(place < over));
        ranked.into_iter().enumerate().map(quota).collect()
    }
}

/// An order of the members that is another one for every version.
fn rank(member: Uuid, salt: u32) -> (u32, Uuid) {
    let bytes = [salt.to_be_bytes().as_slice(), member.as_bytes()].concat();
    (consistency::fnv1a_32(&bytes), member)
}

#[cfg(test)]
mod tests {
    use proptest::collection::{btree_map, btree_set, vec};
    use proptest::prelude::*;

    use super::*;

    fn process(number: u8) -> Uuid {
        Uuid::from_u128(u128::from(number) * 0x0123_4567_89ab_cdef)
    }

    fn split(members: &[u8], holders: &[(u16, u8)]) -> Split {
        Split {
            members: members.iter().copied().map(process).collect(),
            holders: holders.iter().map(|(held, by)| (*held, process(*by))).collect(),
        }
    }

    /// Every member does what it is to do, in the given order or all at once.
    fn apply(split: &mut Split, partition_count: u16, salt: u32, at_once: bool) -> usize {
        let seen = split.clone();
        let mut moved = 0;
        for member in seen.members.clone() {
            let from = if at_once { &seen } else { &*split };
            let Moves { take, give } = from.moves(member, partition_count, salt);
            moved += give.len() + take.len();
            for one in give {
                assert_eq!(split.holders.remove(&one), Some(member), "only its own is given up");
            }
            for one in take {
                assert_eq!(split.holders.insert(one, member), None, "only what is free is taken");
            }
        }
        moved
    }

    fn counts(split: &Split) -> Vec<usize> {
        let mut counts: Vec<usize> =
            split.members.iter().map(|member| split.held_by(*member).len()).collect();
        counts.sort_unstable();
        counts
    }

    #[test]
    fn a_member_that_joins_gets_its_share_and_one_that_leaves_is_made_good() {
        let mut split = split(&[1], &[]);
        let settled = |split: &mut Split| {
            while apply(split, 8, 7, true) > 0 {}
            counts(split)
        };
        assert_eq!(settled(&mut split), [8]);
        split.members.insert(process(2));
        assert_eq!(settled(&mut split), [4, 4]);
        split.members.insert(process(3));
        assert_eq!(settled(&mut split), [2, 3, 3]);
        split.members.remove(&process(1));
        split.holders.retain(|_, holder| *holder != process(1));
        assert_eq!(settled(&mut split), [4, 4]);
    }

    #[test]
    fn the_one_with_more_is_not_the_same_in_every_version() {
        let split = split(&[1, 2, 3], &[]);
        let first = |salt| {
            let most = |member: &&Uuid| split.moves(**member, 8, salt).take.len();
            split.members.iter().min_by_key(most).copied()
        };
        let mut seen: BTreeSet<Option<Uuid>> = BTreeSet::new();
        seen.extend((0..32).map(first));
        assert_eq!(seen.len(), 3);
    }

    proptest! {
        #[test]
        fn every_start_ends_even_with_everything_held_and_then_rests(
            members in btree_set(0_u8..6, 1..6),
            strangers in 6_u8..9,
            holders in btree_map(0_u16..24, 0_u8..9, 0..24),
            partition_count in 1_u16..24,
            salt: u32,
            at_once in vec(any::<bool>(), 4),
        ) {
            let members: Vec<u8> = members.into_iter().collect();
            let mut holders: Vec<(u16, u8)> = holders.into_iter().collect();
            // Held by a member, or by someone who was named by hand.
            holders.retain(|(held, by)| {
                *held < partition_count && (members.contains(by) || *by >= strangers)
            });
            let mut split = split(&members, &holders);
            let by_hand = split.holders.values().filter(|by| !split.members.contains(by)).count();
            for at_once in at_once {
                apply(&mut split, partition_count, salt, at_once);
            }
            let counts = counts(&split);
            prop_assert!(counts[counts.len() - 1] - counts[0] <= 1, "{counts:?}");
            prop_assert_eq!(split.holders.len(), usize::from(partition_count));
            let still = split.holders.values().filter(|by| !split.members.contains(by)).count();
            prop_assert_eq!(still, by_hand, "what was named by hand is left alone");
            prop_assert_eq!(apply(&mut split, partition_count, salt, true), 0, "it rests");
        }
    }
}
